"""docs/cookbook/slack-bot: the real bot and the real ATLUS. Of Slack there is a stand-in for the two methods of its Web
API that the bot calls, and what Slack would send is signed as Slack signs it."""

import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from conftest import COOKBOOK
from slack_sdk.signature import SignatureVerifier

SECRET = "8f742231b10e8888abcd99yyyzzz85a5"
numbers = itertools.count(1)


class SlackApi(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = {"ok": True, "user_id": "UBOT", "user": "bot", "bot_id": "BBOT", "team_id": "T1", "team": "team"}
        if self.path == "/api/chat.postMessage":
            post = json.loads(body)
            self.server.posts.put((post["channel"], post["thread_ts"], post["text"]))
            answer = {"ok": True, "channel": post["channel"], "ts": "1.2"}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def slack():
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlackApi)
    server.posts = queue.Queue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def start_bot(slack, **environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "SLACK_API_URL": f"http://127.0.0.1:{slack.server_port}/api/", "SLACK_BOT_TOKEN": "xoxb-1",
        "SLACK_SIGNING_SECRET": SECRET, "PORT": str(port),
    }
    process = subprocess.Popen(
        [sys.executable, COOKBOOK / "slack-bot" / "bot.py"], env=os.environ | settings | environment
    )
    process.url = f"http://127.0.0.1:{port}/slack/events"
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return process
        except OSError:
            time.sleep(0.1)
    process.kill()
    pytest.fail("the bot does not start")


def stop(process):
    process.terminate()
    process.wait()


@pytest.fixture
def bot(slack):
    process = start_bot(slack)
    yield process
    stop(process)


@pytest.fixture
def channel():
    return f"C{uuid.uuid4().hex[:10].upper()}"


def send(bot, channel, text, thread=None, event_id=None, secret=SECRET, **rest):
    """Sends what Slack sends when somebody mentions the bot, and tells its thread."""
    ts = f"1700000000.{next(numbers):06}"
    event = {"type": "app_mention", "user": "U1", "text": f"<@UBOT> {text}", "ts": ts, "channel": channel, **rest}
    if thread:
        event["thread_ts"] = thread
    body = json.dumps({
        "type": "event_callback", "team_id": "T1", "api_app_id": "A1", "event": event,
        "event_id": event_id or f"Ev{uuid.uuid4().hex[:10].upper()}", "event_time": 1700000000,
    })
    now = str(int(time.time()))
    headers = {
        "Content-Type": "application/json", "X-Slack-Request-Timestamp": now,
        "X-Slack-Signature": SignatureVerifier(secret).generate_signature(timestamp=now, body=body),
    }
    answer = httpx.post(bot.url, content=body, headers=headers)
    assert answer.status_code == (200 if secret == SECRET else 401), answer.text
    return thread or ts


def posted(slack):
    return slack.posts.get(timeout=60)


def sessions(atlus, channel):
    found = atlus.get("/sessions", params={"metadata": json.dumps({"slack_channel": channel})}).json()
    return [item["session_id"] for item in found["data"]["items"]]


def test_a_thread_is_answered_and_remembered(slack, bot, channel):
    thread = send(bot, channel, "Hi, my name is John")
    assert posted(slack) == (channel, thread, "Hello! Nice to meet you, John.")
    send(bot, channel, "What's my name?", thread)
    assert posted(slack) == (channel, thread, "Your name is John.")


def test_each_thread_is_a_session(atlus, slack, bot, channel):
    first = send(bot, channel, "Hello")
    assert posted(slack)[1] == first
    second = send(bot, channel, "Hello")
    assert posted(slack)[1] == second
    assert len(set(sessions(atlus, channel))) == 2


def test_another_channel_knows_nothing(slack, bot, channel):
    send(bot, channel, "Hi, my name is John")
    posted(slack)
    send(bot, f"{channel}X", "What's my name?")
    assert posted(slack)[2] == "You have not told me your name yet."


def test_an_event_that_slack_sends_again_is_answered_once(atlus, slack, bot, channel, turns_of):
    thread = send(bot, channel, "Hello", event_id=f"Ev1{channel}")
    posted(slack)
    send(bot, channel, "Hello", thread, event_id=f"Ev1{channel}")
    send(bot, channel, "My name is Jo", thread)
    assert "Jo" in posted(slack)[2]
    stop(bot)
    assert slack.posts.empty()
    [session] = sessions(atlus, channel)
    assert [message for message, _ in turns_of(session)] == ["Hello", "My name is Jo"]


def test_a_bot_that_was_restarted_goes_on(slack, bot, channel):
    thread = send(bot, channel, "Hi, my name is John")
    posted(slack)
    stop(bot)
    again = start_bot(slack)
    send(again, channel, "What's my name?", thread)
    assert posted(slack)[2] == "Your name is John."
    stop(again)


def test_a_direct_message_needs_no_mention(slack, bot, channel):
    send(bot, channel, "Hello", type="message", channel_type="channel")
    send(bot, channel, "Hello", type="message", channel_type="im", subtype="message_changed")
    thread = send(bot, channel, "Hi, my name is John", type="message", channel_type="im")
    assert posted(slack) == (channel, thread, "Hello! Nice to meet you, John.")
    assert slack.posts.empty()


def test_what_slack_has_not_signed_is_refused(atlus, slack, bot, channel):
    send(bot, channel, "Hello", secret="of somebody else")
    assert sessions(atlus, channel) == []


def test_it_says_so_if_it_cannot_answer(slack, channel):
    bot = start_bot(slack, ATLUS_API_KEY="atlus_wrong")
    thread = send(bot, channel, "Hello")
    assert posted(slack) == (channel, thread, "Sorry, I cannot answer now. Please try again later.")
    stop(bot)
