"""A Slack bot that remembers: each Slack thread is a session of ATLUS."""

import json
import logging
import os
import re

import httpx
from slack_bolt import App
from slack_sdk import WebClient

atlus = httpx.Client(
    base_url=os.environ.get("ATLUS_SERVER", "http://127.0.0.1:5000") + "/api/v1",
    headers={"Authorization": f"Bearer {os.environ['ATLUS_API_KEY']}"},
    # A model may take its time.
    timeout=150,
)
slack = WebClient(
    token=os.environ["SLACK_BOT_TOKEN"], base_url=os.environ.get("SLACK_API_URL", WebClient.BASE_URL)
)
app = App(client=slack, signing_secret=os.environ["SLACK_SIGNING_SECRET"])


def session_of(channel: str, thread: str) -> str:
    """The session of a thread, found by its metadata, made with the thread's first message."""
    metadata = {"slack_channel": channel, "slack_thread": thread}
    found = atlus.get("/sessions", params={"metadata": json.dumps(metadata), "limit": 1}).raise_for_status()
    for session in found.json()["data"]["items"]:
        return session["session_id"]
    # Two messages that come at once make one session. What is learnt in a channel is known in that channel only.
    made = atlus.post(
        "/sessions",
        json={"user_id": f"slack-{channel}", "metadata": metadata},
        headers={"Idempotency-Key": f"slack-{channel}-{thread}"},
    )
    return made.raise_for_status().json()["data"]["session_id"]


def answer(body, event, say):
    """Answers a message in its thread, once, however often Slack sends the event."""
    channel, thread = event["channel"], event.get("thread_ts", event["ts"])
    try:
        reply = atlus.post(
            "/chat",
            json={
                "session_id": session_of(channel, thread),
                "message": re.sub(r"<@\w+>", "", event["text"]),
                "metadata": {"slack_user": event["user"]},
            },
            headers={"Idempotency-Key": body["event_id"]},
        )
        running = reply.status_code == 409 and reply.json()["error"]["code"] == "IDEMPOTENCY_IN_PROGRESS"
        if running or "Idempotency-Replayed" in reply.headers:
            return
        text = reply.raise_for_status().json()["data"]["response"]
    except httpx.HTTPError as error:
        logging.error("no answer to event %s: %s", body["event_id"], error)
        text = "Sorry, I cannot answer now. Please try again later."
    say(text=text, thread_ts=thread)


@app.event("app_mention")
def mentioned(body, event, say):
    answer(body, event, say)


@app.event("message")
def written(body, event, say):
    # In channels only what mentions the bot is for it, and edits and joins are messages, too.
    if event["channel_type"] == "im" and "subtype" not in event:
        answer(body, event, say)


if __name__ == "__main__":
    app.start(port=int(os.environ.get("PORT", "3000")))
