#!/usr/bin/env python3
"""What a good client notices, and what the server pays, while others misbehave.

    bench/hostile.py [--binary target/release/atlus] [--seconds 30] [--slow 1000] [--rate 2000]
        [--call "POST /api/v1/chat" --body "{"] [--header "X-API-Key: wrong"] [--env ATLUS_AUTH=required] [--key KEY]

Starts the binary on a new SQLite file with the built-in responder. First it holds idle connections and tells what each
takes. Then, for so many seconds, it holds slow connections, of four kinds in turn: heads and bodies that come a byte
each few seconds, answers that are never read, and connections on which nothing is said; whoever is dropped comes again.
Beside them it makes calls that are refused: bad JSON and an unknown route, or what --call, --body and --header say.
Meanwhile a good client chats once a second, each time on a new connection, with --key if it needs one. Needs Python 3
on Linux and nothing else.
"""

import argparse
import asyncio
import collections
import http.client
import json
import multiprocessing
import resource
import socket
import statistics
import tempfile
import threading
import time

from server import Server

HOST = "127.0.0.1"


class Good:
    """Chats once a second, and notes how long each answer took."""

    def __init__(self, port, key):
        self.port, self.headers = port, {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.session = self.call("/sessions", {})["session_id"]
        self.took, self.failed = [], collections.Counter()

    def call(self, path, body):
        connection = http.client.HTTPConnection(HOST, self.port, timeout=20)
        try:
            connection.request("POST", "/api/v1" + path, json.dumps(body), self.headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status >= 300:
            raise OSError(answer["error"]["code"])
        return answer["data"]

    def chat(self, seconds):
        for second in range(seconds):
            began = time.perf_counter()
            try:
                self.call("/chat", {"session_id": self.session, "message": f"This is message {second}."})
                self.took.append(1000 * (time.perf_counter() - began))
            except (OSError, http.client.HTTPException) as error:
                self.failed[f"{type(error).__name__}: {error}"] += 1
            time.sleep(max(0, 1 - (time.perf_counter() - began)))


HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"
KINDS = {
    "head": f"POST /api/v1/chat HTTP/1.1\r\n{HEAD}X-Slow: ".encode(),
    "body": f"POST /api/v1/chat HTTP/1.1\r\n{HEAD}Content-Length: 1000000\r\n\r\n".encode() + b"x" * 500_000,
    "deaf": f"GET /docs HTTP/1.1\r\n{HEAD}\r\n".encode() * 50,
    "mute": b"",
}


def hold(port, count, seconds, told):
    """Holds slow connections; tells how many were open on average, and how often one had to come again."""
    ends, held, again = time.monotonic() + seconds, [0], collections.Counter()

    async def slow(kind):
        while time.monotonic() < ends:
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            counted = 0
            try:
                await loop.sock_connect(connection, (HOST, port))
                held[0] += 1
                counted = 1
                await asyncio.wait_for(loop.sock_sendall(connection, KINDS[kind]), max(0.1, ends - time.monotonic()))
                while time.monotonic() < ends:
                    if kind in ("head", "body"):
                        await loop.sock_sendall(connection, b"x")
                    if kind == "deaf":
                        await asyncio.sleep(3)
                        await loop.sock_sendall(connection, b"")
                        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                            raise OSError("dropped")
                        continue
                    # What it hears is that it was dropped, or refused.
                    try:
                        await asyncio.wait_for(loop.sock_recv(connection, 65536), 3)
                        raise OSError("dropped")
                    except TimeoutError:
                        pass
            except (OSError, TimeoutError):
                again[kind] += 1
                await asyncio.sleep(0.1)
            finally:
                held[0] -= counted
                connection.close()

    async def everybody():
        tasks = [asyncio.create_task(slow(list(KINDS)[i % len(KINDS)])) for i in range(count)]
        seen = []
        while time.monotonic() < ends:
            await asyncio.sleep(0.5)
            seen.append(held[0])
        await asyncio.wait(tasks, timeout=5)
        told.put((statistics.mean(seen), dict(again)))

    asyncio.run(everybody())


def refused(port, calls, rate, seconds, told):
    """Makes calls at a rate, or as fast as they go; tells how often each status was answered."""
    connections, answered = [], collections.Counter()
    for _ in range(8):
        connections.append([socket.create_connection((HOST, port)), b""])
    began = time.perf_counter()
    made = 0
    while time.perf_counter() - began < seconds:
        for connection, _ in connections:
            connection.sendall(calls[made % len(calls)])
            made += 1
        for i, (connection, _) in enumerate(connections):
            status, closes = read_answer(connection)
            answered[status] += 1
            if closes:
                connection.close()
                connections[i][0] = socket.create_connection((HOST, port))
        time.sleep(max(0, made / rate - (time.perf_counter() - began)))
    told.put((made / (time.perf_counter() - began), dict(answered)))


def read_answer(connection):
    """The status of an answer, and whether its connection closes."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        received = connection.recv(65536)
        if not received:
            return "closed", True
        answer += received
    head, body = answer.split(b"\r\n\r\n", 1)
    head = head.lower()
    length = int(head.split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0]) if b"content-length: " in head else 0
    while len(body) < length:
        body += connection.recv(65536)
    return head[9:12].decode(), b"connection: close" in head


def request(line, body, headers):
    lines = [f"{line} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
             f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


def idle(server, count):
    """What an idle connection takes, in KiB: one on which nothing was said, and one that has had an answer."""
    before, connections = server.memory(), []
    for _ in range(count):
        connections.append(socket.create_connection((HOST, server.port)))
    time.sleep(1)
    silent = (server.memory() - before) / count
    for connection in connections:
        connection.sendall(request("GET /livez", "", []))
    for connection in connections:
        read_answer(connection)
    time.sleep(1)
    served = (server.memory() - before) / count
    for connection in connections:
        connection.close()
    time.sleep(1)
    return silent, served


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/atlus")
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--slow", type=int, default=1000)
    parser.add_argument("--rate", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--call")
    parser.add_argument("--body", default="")
    parser.add_argument("--header", action="append", default=[])
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--key")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        settings = {"ATLUS_RATE_LIMIT": "100/60s", **dict(setting.split("=", 1) for setting in options.env)}
        server = Server(options.binary, f"sqlite://{folder}/hostile.db", **settings)
        try:
            measure(server, options)
        finally:
            server.stop()


def measure(server, options):
    if options.call:
        calls = [request(options.call, options.body, options.header)]
    else:
        calls = [request("POST /api/v1/chat", "{", options.header), request("GET /api/v1/nothing", "", options.header)]
    good = Good(server.port, options.key)
    good.chat(3)
    print(f"alone, a chat took {statistics.median(good.took):.1f} ms; memory {server.memory() / 1024:.1f} MiB")
    silent, served = idle(server, options.slow)
    print(f"{options.slow} idle connections: {silent:.1f} KiB each before a request, {served:.1f} KiB after one")

    good.took.clear()
    before, told, rates = server.memory(), multiprocessing.Queue(), multiprocessing.Queue()
    workers = [multiprocessing.Process(target=hold, args=(server.port, options.slow, options.seconds, told))]
    share = options.rate / options.processes
    for _ in range(options.processes):
        workers.append(multiprocessing.Process(
            target=refused, args=(server.port, calls, share, options.seconds, rates)))
    for worker in workers:
        worker.start()
    peak = [before]
    over = threading.Event()

    def watch():
        while not over.wait(0.1):
            peak[0] = max(peak[0], server.memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    good.chat(options.seconds)
    held, again = told.get()
    made = [rates.get() for _ in range(options.processes)]
    for worker in workers:
        worker.join()
    over.set()
    watcher.join()
    time.sleep(5)
    statuses = sum((collections.Counter(statuses) for _, statuses in made), collections.Counter())
    print(f"held {held:.0f} slow connections of {options.slow}; dropped and come again: {again}")
    print(f"refused calls: {sum(rate for rate, _ in made):.0f} a second of {options.rate}; answers: {dict(statuses)}")
    print(f"good chats: {len(good.took)} of {options.seconds}; failed: {dict(good.failed)}")
    if good.took:
        slowest = ", ".join(f"{took:.1f}" for took in sorted(good.took, reverse=True)[:3])
        print(f"    p50 {statistics.median(good.took):.1f} ms, max {max(good.took):.1f} ms; the first took "
              f"{good.took[0]:.1f}, the slowest {slowest}")
    print(f"memory: {before / 1024:.1f} MiB before, {peak[0] / 1024:.1f} at most, "
          f"{server.memory() / 1024:.1f} five seconds after")


if __name__ == "__main__":
    main()
