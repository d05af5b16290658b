"""Moves the conversations of the Flask service into ATLUS.

    python move.py DATA

DATA is the folder in which the Flask service keeps its files: `sessions.json`, and a file `session_….json` with the
messages of each session. Prints the old and the new id of each session. Run again, it goes on where it broke off, and
leaves what was moved as it is.
"""

import json
import os
import sys
import time
from pathlib import Path

import httpx

atlus = httpx.Client(
    base_url=os.environ.get("ATLUS_SERVER", "http://127.0.0.1:5000") + "/api/v1",
    headers={"Authorization": f"Bearer {os.environ['ATLUS_API_KEY']}"} if "ATLUS_API_KEY" in os.environ else {},
    timeout=60,
)


def call(method: str, path: str, **arguments) -> dict:
    """What is answered; a call beyond the rate limit waits for as long as the server says."""
    while (answer := atlus.request(method, path, **arguments)).status_code == 429:
        time.sleep(int(answer.headers["Retry-After"]))
    body = answer.json()
    if not body["success"]:
        sys.exit(f"{method} {path}: {body['error']['code']}: {body['error']['message']}")
    return body["data"]


def turns_of(old: dict, history: list[dict]) -> list[dict]:
    """Messages with their answers, without what was never answered. The files do not say when they were made."""
    pairs = zip(history, history[1:])
    return [
        {"message": said["content"], "response": answer["content"], "created_at": old["last_activity"]}
        for said, answer in pairs
        if (said["role"], answer["role"]) == ("user", "assistant")
    ]


def move(old: dict, history: list[dict]) -> str:
    """The id of the session in ATLUS, which has the old one in its metadata."""
    mark = {"flask_session_id": old["session_id"]}
    found = call("GET", "/sessions", params={"metadata": json.dumps(mark), "limit": 1})["items"]
    new = {"user_id": old["user_id"], "metadata": old["metadata"] | mark}
    session = found[0] if found else call("POST", "/sessions", json=new)
    path = f"/sessions/{session['session_id']}"
    turns = turns_of(old, history)
    there = call("GET", path)["memory"]["conversation_turns"]
    for start in range(there, len(turns), 100):
        call("POST", f"{path}/turns", json={"turns": turns[start : start + 100]})
    if session["is_active"] and not old["is_active"]:
        call("PATCH", path, json={"is_active": False})
    return session["session_id"]


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    data = Path(sys.argv[1])
    histories = {kept["session_id"]: kept["history"] for kept in map(read, data.glob("session_*.json"))}
    # The last one moved is the newest: it is the one that GET /sessions/continue finds.
    for old in sorted(read(data / "sessions.json").values(), key=lambda old: old["last_activity"]):
        print(old["session_id"], move(old, histories.get(old["session_id"], [])), flush=True)


main()
