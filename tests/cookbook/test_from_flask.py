"""docs/cookbook/from-flask: the files of the Flask service become sessions and turns."""

import json
import os
import subprocess
import sys
import uuid

import pytest
from conftest import COOKBOOK


def session(user, last_activity, **rest):
    return {
        "session_id": f"session_{uuid.uuid4().hex[:16]}", "user_id": user, "created_at": "2024-01-01T12:00:00.123456Z",
        "last_activity": last_activity, "metadata": {}, "is_active": True, **rest,
    }


def said(*contents):
    return [{"role": role, "content": content} for role, content in zip(["user", "assistant"] * 200, contents)]


@pytest.fixture
def move(tmp_path):
    """Writes the files of the Flask service, moves them, and tells the new id of each old one."""

    def move(*sessions, **environment):
        (tmp_path / "sessions.json").write_text(json.dumps({old["session_id"]: old for old, _ in sessions}))
        for old, history in sessions:
            kept = {"session_id": old["session_id"], "history": history}
            (tmp_path / f"session_{old['session_id']}.json").write_text(json.dumps(kept))
        command = [sys.executable, COOKBOOK / "from-flask" / "move.py", tmp_path]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)
        assert run.returncode == 0, run.stderr
        return dict(line.split() for line in run.stdout.splitlines())

    return move


@pytest.fixture
def user():
    return f"user-{uuid.uuid4()}"


def test_a_conversation_is_moved_and_goes_on(atlus, move, turns_of, user):
    old = session(user, "2024-01-01T12:30:00.654321Z", metadata={"source": "web"})
    new = move((old, said("Hi, my name is Jo", "Hello Jo!", "Bye", "Good bye!")))[old["session_id"]]
    assert turns_of(new) == [("Hi, my name is Jo", "Hello Jo!"), ("Bye", "Good bye!")]
    moved = atlus.get(f"/sessions/{new}").json()["data"]
    assert moved["user_id"] == user
    assert moved["metadata"] == {"source": "web", "flask_session_id": old["session_id"]}
    answer = atlus.post("/chat", json={"session_id": new, "message": "What's my name?"}).json()
    assert answer["data"]["response"] == "Your name is Jo."


def test_a_session_is_found_by_its_old_id(atlus, move, user):
    old = session(user, "2024-01-01T12:30:00Z")
    new = move((old, said("Hello", "Hi")))[old["session_id"]]
    found = atlus.get("/sessions", params={"metadata": json.dumps({"flask_session_id": old["session_id"]})}).json()
    assert [item["session_id"] for item in found["data"]["items"]] == [new]


def test_moving_again_changes_nothing(move, turns_of, user):
    old, history = session(user, "2024-01-01T12:30:00Z"), said("Hello", "Hi")
    first, second = move((old, history)), move((old, history))
    assert first == second
    assert turns_of(first[old["session_id"]]) == [("Hello", "Hi")]


def test_a_move_that_broke_off_goes_on(atlus, move, turns_of, user):
    old = session(user, "2024-01-01T12:30:00Z")
    history = said(*(f"text {number}" for number in range(300)))
    move((old, history[:220]))
    new = move((old, history))[old["session_id"]]
    # More turns than one request may add, and than one page lists.
    assert atlus.get(f"/sessions/{new}").json()["data"]["memory"]["conversation_turns"] == 150
    assert turns_of(new) == [(f"text {number}", f"text {number + 1}") for number in range(0, 200, 2)]


def test_the_newest_session_is_the_one_to_continue(atlus, move, user):
    newest, oldest = session(user, "2024-03-01T12:00:00Z"), session(user, "2024-02-01T12:00:00Z")
    new = move((newest, said("Newest", "Yes")), (oldest, said("Oldest", "Yes")))
    continued = atlus.get("/sessions/continue", params={"user_id": user}).json()["data"]
    assert continued["session_id"] == new[newest["session_id"]]


def test_an_ended_session_stays_ended(atlus, move, turns_of, user):
    old = session(user, "2024-01-01T12:30:00Z", is_active=False)
    new = move((old, said("Hello", "Hi")))[old["session_id"]]
    assert turns_of(new) == [("Hello", "Hi")]
    assert atlus.get(f"/sessions/{new}").json()["data"]["is_active"] is False
    assert move((old, said("Hello", "Hi"))) == {old["session_id"]: new}


def test_a_message_without_an_answer_is_left_out(move, turns_of, user):
    old = session(user, "2024-01-01T12:30:00Z")
    new = move((old, [*said("Lost"), *said("Hello", "Hi")]))[old["session_id"]]
    assert turns_of(new) == [("Hello", "Hi")]


def test_a_rate_limit_slows_it_down_and_loses_nothing(move, user):
    sessions = [(session(user, f"2024-01-01T12:30:{number:02}Z"), said("Hello", "Hi")) for number in range(12)]
    limited = {"ATLUS_SERVER": os.environ["LIMITED_SERVER"], "ATLUS_API_KEY": os.environ["LIMITED_API_KEY"]}
    assert move(*sessions, **limited).keys() == {old["session_id"] for old, _ in sessions}
