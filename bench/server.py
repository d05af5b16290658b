"""A server to be measured, and what it is filled with. Needs Python 3 on Linux and nothing else."""

import http.client
import json
import os
import random
import re
import subprocess
import tempfile
import time

JSON = {"Content-Type": "application/json"}
CHOICE = random.Random(7)
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("ban", "del", "fin", "mor", "tis")]


def text(words):
    return " ".join(CHOICE.choices(WORDS, k=words)).capitalize() + "."


class Server:
    """Runs the binary on a database, with the built-in responder unless the settings say otherwise."""

    def __init__(self, binary, database, **settings):
        self.binary = binary
        self.env = {"ATLUS_DATABASE_URL": database, "ATLUS_LISTEN": "127.0.0.1:0", "ATLUS_RATE_LIMIT": "off",
                    "ATLUS_LOG": "warn,atlus::cli=info", "ATLUS_LOG_FORMAT": "text", "PATH": os.environ["PATH"], **settings}
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen([binary], stderr=self.log, env=self.env)
        while not (found := re.search(r"listening on http://(([\d.]+):(\d+))", self.said())):
            if self.process.poll() is not None:
                raise SystemExit(f"the server did not start: {self.said()}")
            time.sleep(0.001)
        self.address, self.port = found[1], int(found[3])
        self.url = f"http://{self.address}"
        self.connection = http.client.HTTPConnection(self.address, timeout=600)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """In order, so that SQLite leaves no write-ahead log behind."""
        # The server would give a client that stays some time to leave.
        self.connection.close()
        self.process.terminate()
        self.process.wait()

    def said(self):
        return os.pread(self.log.fileno(), 1 << 16, 0).decode()

    def call(self, method, path, body=None):
        """The data of an answer."""
        self.connection.request(method, "/api/v1" + path, None if body is None else json.dumps(body), JSON)
        response = self.connection.getresponse()
        answer = json.loads(response.read())
        if response.status >= 300:
            raise SystemExit(f"{method} {path}: {answer}")
        return answer.get("data")

    def memory(self, name="VmRSS", file="status"):
        """In KiB: a line of the process's `status` or `smaps_rollup`."""
        with open(f"/proc/{self.process.pid}/{file}") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
