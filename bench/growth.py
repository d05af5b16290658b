#!/usr/bin/env python3
"""How the cost of a session grows with its turns: the same requests to short and to long sessions, in turn.

    bench/growth.py [--binary target/release/atlus] [--database URL] [--turns 100000] [--rounds 200]

Starts the binary on a new SQLite file, or on the database that is named (which it fills), with the built-in responder,
so that what is measured is the server and its database. A context has room for about half of a short session, and a page
for half of it: so as much is shown of either, and in both it is looked for older turns that bear on the message. Prints
medians in milliseconds and their ratio. Needs Python 3 and nothing else.
"""

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import tempfile
import time

SHORT_SESSIONS, SHORT_TURNS = 20, 10
random.seed(7)
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u") for c in ("ban", "del", "fin", "mor", "tis")]


class Server:
    def __init__(self, binary, database):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        env = {"ATLUS_LISTEN": f"127.0.0.1:{self.port}", "ATLUS_DATABASE_URL": database, "ATLUS_LOG": "warn", "ATLUS_RATE_LIMIT": "off",
               "ATLUS_CONTEXT_TOKENS": "500", "PATH": os.environ["PATH"]}
        self.process = subprocess.Popen([binary], env=env)
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port)
        for _ in range(200):
            try:
                self.call("GET", "/health")
                return
            except OSError:
                self.connection.close()
                time.sleep(0.05)
        raise SystemExit("the server did not start")

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body)
        self.connection.request(method, "/api/v1" + path, data, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        answer = json.loads(response.read())
        if response.status >= 300:
            raise SystemExit(f"{method} {path}: {answer}")
        return answer.get("data")


def text(words):
    return " ".join(random.choices(WORDS, k=words)).capitalize() + "."


def fill(server, turns):
    session = server.call("POST", "/sessions", {})["session_id"]
    for start in range(0, turns, 100):
        batch = [{"message": text(15), "response": text(25)} for _ in range(min(100, turns - start))]
        server.call("POST", f"/sessions/{session}/turns", {"turns": batch})
    return session


def requests(session, turns, cursor):
    """Every request that is measured, by name."""
    path = f"/sessions/{session}"
    question = "+".join(random.choices(WORDS, k=3))
    return {
        "append a turn": ("POST", f"{path}/turns", {"turns": [{"message": text(15), "response": text(25)}]}),
        "first page": ("GET", f"{path}/turns?limit=5", None),
        "last page": ("GET", f"{path}/turns?limit=5&direction=desc", None),
        "page in the middle": ("GET", f"{path}/turns?limit=5&cursor={cursor}", None),
        "one turn": ("GET", f"{path}/turns/{turns // 2}", None),
        "context": ("GET", f"{path}/context", None),
        "context for a message": ("GET", f"{path}/context?message={question}", None),
        "search in the session": ("GET", f"/search?q={question}&session_id={session}", None),
        "chat": ("POST", "/chat", {"session_id": session, "message": text(8)}),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default="target/release/atlus")
    parser.add_argument("--database")
    parser.add_argument("--turns", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.binary, options.database or f"sqlite://{folder}/growth.db")
        try:
            measure(server, options)
        finally:
            server.process.terminate()
            server.process.wait()


def measure(server, options):
    began = time.monotonic()
    long = fill(server, options.turns)
    spent = time.monotonic() - began
    print(f"filled: {options.turns} turns in {spent:.0f} s, {options.turns / spent:.0f} a second, 100 at a time")
    short = [fill(server, SHORT_TURNS) for _ in range(SHORT_SESSIONS)]
    middle = {}
    for session in [long, *short]:
        # A cursor is opaque: it is had by reading a page.
        page = server.call("GET", f"/sessions/{session}/turns?limit=5")
        middle[session] = page["next_cursor"]
    times = {}
    for round_ in range(options.rounds):
        pair = [(short[round_ % SHORT_SESSIONS], SHORT_TURNS, 0), (long, options.turns, 1)]
        for session, turns, column in pair if round_ % 2 else reversed(pair):
            for name, request in requests(session, turns, middle[session]).items():
                began = time.perf_counter()
                server.call(*request)
                times.setdefault(name, ([], []))[column].append(1000 * (time.perf_counter() - began))
    print(f"| request | {SHORT_TURNS} turns, ms | {options.turns} turns, ms | ratio |\n| --- | --- | --- | --- |")
    for name, (few, many) in times.items():
        few, many = statistics.median(few), statistics.median(many)
        print(f"| {name} | {few:.2f} | {many:.2f} | {many / few:.2f} |")


if __name__ == "__main__":
    main()
