"""Conversations, pages, replays and archives."""

import asyncio
import io
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from atlus_client import AtlusError, Connection, ErrorCode, apages, models, ok, pages
from atlus_client.generated.api.archive import export_session, import_archive
from atlus_client.generated.api.chat import chat
from atlus_client.generated.api.operations import get_health
from atlus_client.generated.api.sessions import (
    create_session,
    delete_session,
    get_session,
    list_sessions,
    update_session,
)
from atlus_client.generated.api.turns import append_turns, list_turns
from atlus_client.generated.types import File
from conftest import World

README = Path(__file__).parent.parent / "README.md"


def someone() -> str:
    """A user whom no other test knows."""
    return f"user_{uuid.uuid4()}"


def new_session(client: Connection, user_id: str = "user_123") -> models.Session:
    return ok(create_session.sync(client=client, body=models.NewSession(user_id=user_id))).data


def say(client: Connection, session_id: str, message: str) -> models.ChatAnswer:
    return ok(chat.sync(client=client, body=models.ChatRequest(session_id=session_id, message=message))).data


def test_conversation_from_creation_to_deletion(client: Connection) -> None:
    user = someone()
    body = models.NewSession.from_dict({"user_id": user, "metadata": {"source": "web"}})
    session = ok(create_session.sync(client=client, body=body)).data
    assert (session.user_id, session.metadata["source"]) == (user, "web")
    assert say(client, session.session_id, "Hello, ATLUS!").response.startswith("Hello!")
    assert "John" in say(client, session.session_id, "Hi, my name is John").response
    assert "Your name is John" in say(client, session.session_id, "What's my name?").response
    recap = say(client, session.session_id, "What did I just say?")
    assert "What's my name?" in recap.response
    assert recap.turn == 4

    memory = ok(get_session.sync(client=client, session_id=session.session_id)).data.memory
    assert memory.conversation_turns == 4
    assert memory.has_session_memory and memory.has_working_memory and memory.has_behavior_profile

    deleted = ok(delete_session.sync(client=client, session_id=session.session_id))
    assert (deleted.message, deleted.session_id) == ("Session deleted successfully", session.session_id)
    with pytest.raises(AtlusError) as gone:
        get_session.sync(client=client, session_id=session.session_id)
    assert gone.value.code is ErrorCode.SESSION_NOT_FOUND
    with pytest.raises(AtlusError) as invalid:
        say(client, session.session_id, "Anybody there?")
    assert invalid.value.code is ErrorCode.INVALID_SESSION


def test_pages_list_every_session_once(client: Connection) -> None:
    user = someone()
    made = [new_session(client, user).session_id for _ in range(45)]
    listed = [s.session_id for s in pages(list_sessions.sync, client=client, user_id=user, limit=10)]
    assert len(listed) == 45
    assert sorted(listed) == sorted(made)


def test_pages_list_every_turn_once_and_in_order(client: Connection) -> None:
    session_id = new_session(client).session_id
    turns = [models.NewTurn(message=f"message {number}", response="noted") for number in range(1, 46)]
    append_turns.sync(client=client, session_id=session_id, body=models.NewTurns(turns=turns))
    listed = list(pages(list_turns.sync, client=client, session_id=session_id, limit=10))
    assert [turn.turn for turn in listed] == list(range(1, 46))
    assert [turn.message for turn in listed] == [turn.message for turn in turns]


def test_async_calls_and_pages(client: Connection) -> None:
    async def talk() -> list[int]:
        async with client:
            session = ok(await create_session.asyncio(client=client, body=models.NewSession())).data
            for message in ("one", "two", "three"):
                body = models.ChatRequest(session_id=session.session_id, message=message)
                await chat.asyncio(client=client, body=body)
            listing = apages(list_turns.asyncio, client=client, session_id=session.session_id, limit=2)
            turns = [turn.turn async for turn in listing]
            with pytest.raises(AtlusError) as error:
                await get_session.asyncio(client=client, session_id="session_0000000000000000")
            assert error.value.code is ErrorCode.SESSION_NOT_FOUND
            return turns

    assert asyncio.run(talk()) == [1, 2, 3]


def test_a_request_sent_again_is_answered_as_before(client: Connection) -> None:
    key = str(uuid.uuid4())
    session_id = new_session(client).session_id
    body = models.ChatRequest(session_id=session_id, message="Hello")
    first, second = (chat.sync_detailed(client=client, body=body, idempotency_key=key) for _ in range(2))
    assert "Idempotency-Replayed" not in first.headers
    assert second.headers["Idempotency-Replayed"] == "true"
    assert ok(second.parsed).data == ok(first.parsed).data
    assert len(list(pages(list_turns.sync, client=client, session_id=session_id))) == 1


def test_etag_guards_a_change(client: Connection) -> None:
    session_id = new_session(client).session_id
    etag = get_session.sync_detailed(client=client, session_id=session_id).headers["ETag"]
    body = models.SessionChange(title="Names")
    changed = ok(update_session.sync(client=client, session_id=session_id, body=body, if_match=etag)).data
    assert changed.title == "Names"
    with pytest.raises(AtlusError) as error:
        update_session.sync(client=client, session_id=session_id, body=body, if_match=etag)
    assert error.value.code is ErrorCode.PRECONDITION_FAILED


def test_archive_comes_back(client: Connection) -> None:
    session_id = new_session(client).session_id
    say(client, session_id, "Hello")
    archive = ok(export_session.sync(client=client, session_id=session_id)).payload.read()
    delete_session.sync(client=client, session_id=session_id)
    imported = ok(import_archive.sync(client=client, body=File(payload=io.BytesIO(archive)))).data
    assert (imported.sessions, imported.turns) == (1, 1)
    assert ok(get_session.sync(client=client, session_id=session_id)).data.memory.conversation_turns == 1


def test_health_is_described(client: Connection) -> None:
    assert ok(get_health.sync(client=client)).status == "healthy"


def test_settings_of_a_connection_keep_key_and_errors(world: World) -> None:
    client = world.connect("keyed").with_headers({"X-Request-ID": "mine"})
    with pytest.raises(AtlusError) as error:
        get_session.sync(client=client, session_id="session_0000000000000000")
    assert (error.value.code, error.value.request_id) == (ErrorCode.SESSION_NOT_FOUND, "mine")


@pytest.mark.parametrize("server", ["open", "keyed"])
def test_readme_works_as_it_stands(world: World, server: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    environment = os.environ | {"ATLUS_SERVER": world.servers[server]}
    if server == "keyed":
        environment["ATLUS_API_KEY"] = world.key
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Nice to meet you, John" in ran.stdout and "Your name is John" in ran.stdout
