"""What the clients are tested against: world.py ATLUS FOLDER.

Several real servers, each with settings that bring out some failures; a model server that misbehaves by the name of the
model; and a proxy that breaks streams. When all are ready, one line of JSON on standard output says where they are. All
of it ends with standard input.
"""

import contextlib
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# By name, how each server is set beside address and database.
SERVERS = {
    "open": {},
    "keyed": {"ATLUS_AUTH": "required"},
    "modelled": {"ATLUS_MODEL": "plain", "ATLUS_MODEL_TIMEOUT": "10s", "ATLUS_MEMORY_EXTRACT": "off"},
    "crowded": {
        "ATLUS_MODEL": "silent",
        "ATLUS_MODEL_TIMEOUT": "2s",
        "ATLUS_MODEL_CONCURRENCY": "1",
        "ATLUS_MEMORY_EXTRACT": "off",
    },
    "limited": {"ATLUS_RATE_LIMIT": "1/60s"},
    "budgeted": {"ATLUS_TOKENS_PER_USER_DAY": "1"},
    "locked": {"ATLUS_DATABASE_TIMEOUT": "1s"},
    "damaged": {},
}
# Two bytes to a character, and one that some readers of lines take for the end of a line.
PIECES = [f"Stück {number}\u2028" for number in range(1, 25)]


class ModelServer(BaseHTTPRequestHandler):
    """Chat completions as OpenAI's; the model's name says how it behaves."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = request["model"]
        if model == "broken":
            self.answer(500, {"error": {"message": "The model is broken"}})
        elif model == "patient":
            self.answer(429, {"error": {"message": "Later"}}, {"Retry-After": "60"})
        elif model == "silent":
            # Until the server gives up.
            self.connection.recv(1)
            self.close_connection = True
        elif request.get("stream"):
            self.stream(model)
        else:
            if model == "slow":
                time.sleep(len(PIECES) * 0.05)
            text = "".join(PIECES) if model == "slow" else "Hello"
            self.answer(200, {"model": model, "choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

    def answer(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def stream(self, model: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        # Whoever cancels a turn leaves.
        with contextlib.suppress(OSError):
            for piece in PIECES if model == "slow" else ["Hello"]:
                self.event({"model": model, "choices": [{"delta": {"content": piece}}]})
                if model == "slow":
                    time.sleep(0.05)
            self.event({"model": model, "choices": [{"delta": {}, "finish_reason": "stop"}]})
            self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data: object) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class BreakingProxy:
    """Passes connections on, and breaks each after three pieces of a stream: one in an event, the next as if in order."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        streams = 0
        while True:
            client, _ = self.listener.accept()
            server = socket.create_connection(("127.0.0.1", self.target))
            streams += 1
            threading.Thread(target=self.requests, args=(client, server), daemon=True).start()
            threading.Thread(target=self.answers, args=(server, client, streams % 2 == 0), daemon=True).start()

    def requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def answers(self, server: socket.socket, client: socket.socket, in_order: bool) -> None:
        passed = b""
        with contextlib.suppress(OSError), server, client:
            while data := server.recv(65536):
                seen = len(passed)
                passed += data
                pieces = [match.end() for match in re.finditer(b"event: delta\n", passed)]
                if len(pieces) > 3:
                    # The end of the third piece's chunk, or the middle of the fourth event.
                    end = passed.rindex(b"\n\n\r\n", 0, pieces[3]) + 4 if in_order else pieces[3] + 2
                    client.sendall(passed[seen:end] + (b"0\r\n\r\n" if in_order else b""))
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)


class Server:
    """A running ATLUS."""

    def __init__(self, atlus: str, folder: Path, name: str, settings: dict[str, str]) -> None:
        self.atlus, self.name, self.database = atlus, name, folder / f"{name}.db"
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "ATLUS_LISTEN": "127.0.0.1:0",
            "ATLUS_LOG_FORMAT": "text",
            "ATLUS_RATE_LIMIT": "off",
            "ATLUS_DATABASE_URL": f"sqlite://{self.database}",
            **settings,
        }
        self.log = folder / f"{name}.log"

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [self.atlus, "serve"], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def url(self) -> str:
        """Its address, once it listens."""
        end = time.monotonic() + 60
        while not (found := re.search(r"listening on (http://127\.0\.0\.1:\d+)", self.log.read_text())):
            if self.process.poll() is not None or time.monotonic() > end:
                sys.exit(f"the server {self.name} does not start:\n{self.log.read_text()}")
            time.sleep(0.02)
        return found[1]

    def key(self, scopes: str) -> str:
        command = [self.atlus, "keys", "create", "--name", scopes, "--scope", scopes, "--format", "json"]
        made = subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, check=True)
        return json.loads(made.stdout)["secret"]


@contextlib.contextmanager
def running(servers: dict[str, Server]) -> Iterator[dict[str, str]]:
    try:
        for server in servers.values():
            server.start()
        yield {name: server.url() for name, server in servers.items()}
    finally:
        for server in servers.values():
            if process := getattr(server, "process", None):
                process.terminate()
        for server in servers.values():
            if process := getattr(server, "process", None):
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()


def main() -> None:
    atlus, folder = sys.argv[1], Path(sys.argv[2])
    models = ThreadingHTTPServer(("127.0.0.1", 0), ModelServer)
    threading.Thread(target=models.serve_forever, daemon=True).start()
    model_url = f"http://127.0.0.1:{models.server_address[1]}/v1"
    servers = {
        name: Server(
            atlus, folder, name, {**settings, **({"ATLUS_MODEL_URL": model_url} if "ATLUS_MODEL" in settings else {})}
        )
        for name, settings in SERVERS.items()
    }
    with running(servers) as urls:
        lock = sqlite3.connect(servers["locked"].database, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        with contextlib.closing(sqlite3.connect(servers["damaged"].database)) as database:
            database.execute("DROP TABLE api_keys")
        proxy = BreakingProxy(int(urls["modelled"].rsplit(":", 1)[1]))
        world = {
            "servers": {**urls, "breaking": proxy.url},
            "key": servers["keyed"].key("read,write,admin"),
            "read_key": servers["keyed"].key("read"),
            "slow_text": "".join(PIECES),
        }
        print(json.dumps(world), flush=True)
        sys.stdin.read()


main()
