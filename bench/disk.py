#!/usr/bin/env python3
"""What a turn takes on disk, search entry and indexes included.

    bench/disk.py [--binary target/release/atlus] [--database URL] [--sessions 200] [--turns 50]

Starts the binary on a new SQLite file, or on the new Postgres database that is named, fills it with sessions of turns of
15 words and answers of 60, and prints the bytes of text and the bytes on disk of one turn. Postgres is asked by psql.
"""

import argparse
import os
import subprocess
import tempfile

from server import Server, text


def size(database, file):
    if database.startswith("sqlite:"):
        return sum(os.path.getsize(file + end) for end in ("", "-wal") if os.path.exists(file + end))
    vacuum_and_ask = ["-c", "VACUUM ANALYZE", "-c", "SELECT pg_database_size(current_database())"]
    asked = subprocess.run(["psql", "-qAt", database, *vacuum_and_ask], capture_output=True, text=True, check=True)
    return int(asked.stdout)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", default="target/release/atlus")
    parser.add_argument("--database")
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--turns", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/disk.db"
        database = options.database or f"sqlite://{file}"
        server = Server(options.binary, database)
        before, letters = size(database, file), 0
        for number in range(options.sessions):
            session = server.call("POST", "/sessions", {"user_id": f"user_{number}"})["session_id"]
            turns = [{"message": text(15), "response": text(60)} for _ in range(options.turns)]
            letters += sum(len(turn["message"]) + len(turn["response"]) for turn in turns)
            server.call("POST", f"/sessions/{session}/turns", {"turns": turns})
        # A server that stops in order leaves no write-ahead log behind.
        server.stop()
        turns = options.sessions * options.turns
        print(f"{turns} turns: {letters // turns} bytes of text each, {(size(database, file) - before) // turns} on disk")


main()
