"""A conversation with a model of your own. ATLUS keeps it and chooses what the model is shown; it calls no model.

    python chat.py [--session ID] COMMAND…

Each line of input is a message. COMMAND reads what the model is shown from its standard input, as the JSON that chat
models take ([{"role": …, "content": …}, …]), and writes the answer to its standard output.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import uuid

import httpx

atlus = httpx.Client(
    base_url=os.environ.get("ATLUS_SERVER", "http://127.0.0.1:5000") + "/api/v1",
    headers={"Authorization": f"Bearer {os.environ['ATLUS_API_KEY']}"} if "ATLUS_API_KEY" in os.environ else {},
)


def call(method: str, path: str, **arguments) -> dict:
    """What is answered, asked for again while the server cannot be reached: a key keeps it from being done twice."""
    headers = {"Idempotency-Key": str(uuid.uuid4())} if method == "POST" else {}
    for wait in (1, 2, 4, None):
        try:
            answer = atlus.request(method, path, headers=headers, **arguments).json()
            break
        except httpx.TransportError as error:
            if wait is None:
                sys.exit(f"no answer from {atlus.base_url}: {error}")
            time.sleep(wait)
    if not answer["success"]:
        sys.exit(f"{answer['error']['code']}: {answer['error']['message']}")
    return answer["data"]


def ask(command: list[str], messages: list[dict]) -> str:
    """The answer of a model that is a program. Put the call of yours here."""
    done = subprocess.run(command, input=json.dumps(messages), stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--session", help="a session to go on with; a new one without")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the model")
    options = parser.parse_args()
    session = options.session or call("POST", "/sessions")["session_id"]
    print(f"Session {session}", file=sys.stderr)
    for message in filter(None, map(str.strip, sys.stdin)):
        context = call("GET", f"/sessions/{session}/context", params={"message": message})
        response = ask(options.command, context["messages"])
        turn = {"message": message, "response": response, "model": options.command[0]}
        call("POST", f"/sessions/{session}/turns", json={"turns": [turn]})
        print(response, flush=True)


main()
