"""docs/cookbook/own-model: a conversation whose model is somebody else's business."""

import re
import subprocess
import sys

from conftest import COOKBOOK

# Tells what it was shown, so that a test can see it.
MODEL = "import json, sys; print('I was shown:', *(m['content'] for m in json.load(sys.stdin) if m['role'] == 'user'))"


def chat(lines, *options, model=MODEL):
    return subprocess.run(
        [sys.executable, COOKBOOK / "own-model" / "chat.py", *options, sys.executable, "-c", model],
        input="\n".join(lines), capture_output=True, text=True, timeout=60,
    )


def session_of(run):
    return re.search(r"session_[0-9a-f]{16}", run.stderr)[0]


def test_the_model_is_shown_what_was_said_before(turns_of):
    run = chat(["Hello", "And now?"])
    assert run.stdout.splitlines() == ["I was shown: Hello", "I was shown: Hello And now?"], run.stderr
    assert turns_of(session_of(run)) == [
        ("Hello", "I was shown: Hello"), ("And now?", "I was shown: Hello And now?")
    ]


def test_a_session_goes_on(turns_of):
    session = session_of(chat(["Hello"]))
    run = chat(["Still there?"], "--session", session)
    assert run.stdout == "I was shown: Hello Still there?\n"
    assert len(turns_of(session)) == 2


def test_a_model_that_fails_leaves_no_turn(turns_of):
    run = chat(["Hello"], model="raise SystemExit(3)")
    assert run.returncode != 0
    assert turns_of(session_of(run)) == []


def test_a_refusal_says_why():
    run = chat(["Hello"], "--session", "session_0000000000000000")
    assert run.returncode != 0
    assert "SESSION_NOT_FOUND" in run.stderr
