#!/usr/bin/env python3
"""Exports and imports a session of 100,000 turns, and prints the time and the memory that the server takes.

    bench/archive.py [--binary target/release/atlus] [--turns 100000] [--postgres postgres://USER@HOST/EMPTY_DATABASE]

Without --postgres the database is a SQLite file in a folder that is removed afterwards.
"""
import argparse, hashlib, http.client, json, os, tempfile, time

from server import Server

ID = "session_00000000000be4c4"
WORDS = "the a of bridge river lisbon tram hill light morning coffee harbour train ticket museum walk".split()


def lines(turns):
    """The archive, line by line; every turn has about 600 bytes of text."""
    yield json.dumps({"type": "archive", "format": "atlus", "version": 1, "of": "session",
                      "exported_at": "2024-01-01T00:00:00Z", "atlus": "0.1.0"})
    when = "2024-01-01T00:00:00.000Z"
    own = [json.dumps({"type": "session", "session_id": ID, "user_id": "bench", "metadata": {}, "created_at": when,
                       "last_activity": when, "temporary": False, "conversation_turns": turns, "memory": {
                           "working_memory": {}, "updated_at": when,
                           "behavior_profile": {"verbosity": "low", "tone": "neutral", "depth": "normal"},
                           "profile_turns": {}}})]
    digest, every = hashlib.sha256(), hashlib.sha256()
    def text(n, length):
        return " ".join(WORDS[(n * 7 + i * i) % len(WORDS)] + ("" if i % 9 else str(n)) for i in range(length))
    for n in range(turns + 1):
        line = own[0] if n == 0 else json.dumps(
            {"type": "turn", "turn": n, "status": "completed", "message": text(n, 30), "response": text(n + 1, 70),
             "model": "bench", "execution_us": 1, "request_id": "req_1", "metadata": {}, "created_at": when,
             "completed_at": when})
        for hash in (digest, every):
            hash.update(line.encode() + b"\n")
        yield line
    line = json.dumps({"type": "session_end", "session_id": ID, "turns": turns, "digest": "sha256:" + digest.hexdigest()})
    every.update(line.encode() + b"\n")
    yield line
    yield json.dumps({"type": "end", "sessions": 1, "turns": turns, "facts": 0, "digest": "sha256:" + every.hexdigest()})


class Archives(Server):
    def request(self, method, path, body=None):
        connection = http.client.HTTPConnection(self.address, timeout=600)
        headers = {"Content-Type": "application/x-ndjson"} if body else {}
        connection.request(method, "/api/v1" + path, body, headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        return answer

    def measure(self, what, turns, work):
        before = self.memory() / 1024
        with open(f"/proc/{self.process.pid}/clear_refs", "w") as refs:
            refs.write("5")  # the peak is counted from here
        began = time.monotonic()
        result = work()
        seconds = time.monotonic() - began
        print(f"{what}: {seconds:.1f} s, {turns / seconds:.0f} turns per second; resident {before:.1f} MiB before, "
              f"peak {self.memory('VmHWM') / 1024 - before:+.1f} MiB, after {self.memory() / 1024 - before:+.1f} MiB", flush=True)
        return result


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--binary", default="target/release/atlus")
    options.add_argument("--turns", type=int, default=100_000)
    options.add_argument("--postgres")
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive, exported = os.path.join(folder, "archive.ndjson"), os.path.join(folder, "exported.ndjson")
        with open(archive, "w") as out:
            out.writelines(line + "\n" for line in lines(options.turns))
        print(f"{options.turns} turns, {os.path.getsize(archive) >> 20} MiB")
        server = Archives(options.binary, options.postgres or f"sqlite://{folder}/atlus.db")
        try:
            def take(path):
                with open(path, "rb") as body:
                    return json.load(server.request("POST", "/import", body))["data"]
            def export():
                answer = server.request("GET", f"/sessions/{ID}/export")
                with open(exported, "wb") as out:
                    while portion := answer.read(1 << 16):
                        out.write(portion)
            # The first requests of a server load what it keeps.
            server.request("GET", "/sessions").read()
            imported = server.measure("import", options.turns, lambda: take(archive))
            assert imported["turns"] == options.turns, imported
            server.measure("export", options.turns, export)
            server.measure("delete", options.turns, lambda: server.request("DELETE", f"/sessions/{ID}").read())
            assert server.measure("import again", options.turns, lambda: take(exported))["turns"] == options.turns
            skipped = server.measure("import of what is there", options.turns, lambda: take(exported))
            assert skipped["skipped_sessions"] == 1, skipped
        finally:
            server.stop()


main()
