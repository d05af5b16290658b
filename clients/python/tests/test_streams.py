"""Streams: whole, broken and resumed, failed, replayed."""

import asyncio
import uuid

import httpx
import pytest
from atlus_client import (
    AtlusError,
    Connection,
    ErrorCode,
    Event,
    aresume,
    astream,
    connect,
    models,
    ok,
    resume,
    stream,
)
from atlus_client.generated.api.sessions import create_session
from atlus_client.generated.api.turns import cancel_turn
from conftest import World


def request(client: Connection, message: str = "Hello", model: str | None = None) -> models.ChatRequest:
    """A message to a new session."""
    session = ok(create_session.sync(client=client, body=models.NewSession())).data
    return models.ChatRequest(session_id=session.session_id, message=message, model=model)


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def assert_whole(events: list[Event], expected: str) -> None:
    """One start, every piece once and in its place, one end that says the same."""
    start, *deltas, done = events
    assert isinstance(start.data, models.StartEvent) and start.data.turn == 1
    assert all(isinstance(event.data, models.DeltaEvent) for event in deltas)
    offset = 0
    for event in deltas:
        offset += len(event.text.encode())
        assert event.id == offset
    assert isinstance(done.data, models.ChatAnswer) and done.data.response == text(events) == expected


def test_a_stream_tells_start_pieces_and_answer(client: Connection) -> None:
    ask = request(client, "Hi, my name is John")
    assert_whole(list(stream(client, ask)), "Hello! Nice to meet you, John.")


def test_a_stream_that_breaks_goes_on_by_itself(world: World) -> None:
    client = world.connect("breaking")
    events = list(stream(client, request(client, model="slow")))
    # It broke several times: after three pieces each.
    assert len(events) > 10
    assert_whole(events, world.slow_text)


def test_a_stream_that_breaks_goes_on_by_itself_for_async_for(world: World) -> None:
    client = world.connect("breaking")
    ask = request(client, model="slow")

    async def listen() -> list[Event]:
        async with client:
            return [event async for event in astream(client, ask)]

    assert_whole(asyncio.run(listen()), world.slow_text)


def test_a_stream_is_given_up_when_told_to(world: World) -> None:
    client = world.connect("breaking")
    with pytest.raises(httpx.TransportError):
        list(stream(client, request(client, model="slow"), resumes=0))


def test_a_stream_is_resumed_elsewhere(world: World) -> None:
    client = world.connect("modelled")
    heard: list[Event] = []
    for event in stream(client, request(client, model="slow")):
        heard.append(event)
        if len(heard) == 5:
            break
    start = heard[0].data
    assert isinstance(start, models.StartEvent)
    rest = list(resume(world.connect("modelled"), start.session_id, start.turn, heard[-1].id))
    assert_whole(heard + rest, world.slow_text)


def test_a_stream_is_heard_again_from_the_beginning(world: World) -> None:
    client = world.connect("open")
    first = list(stream(client, request(client)))
    start = first[0].data
    assert isinstance(start, models.StartEvent)
    again = list(resume(client, start.session_id, start.turn))
    assert_whole(again, text(first))

    async def listen() -> list[Event]:
        async with client:
            return [event async for event in aresume(client, start.session_id, start.turn, first[-1].id)]

    assert [type(event.data) for event in asyncio.run(listen())] == [models.ChatAnswer]


def test_a_stream_with_a_key_is_replayed(client: Connection) -> None:
    key, ask = str(uuid.uuid4()), request(client)
    first, again = (list(stream(client, ask, idempotency_key=key)) for _ in range(2))
    assert again[-1].data == first[-1].data
    assert text(again) == text(first)


def test_a_turn_that_fails_in_its_stream_raises(world: World) -> None:
    client = world.connect("modelled")
    events = stream(client, request(client, model="broken"))
    assert isinstance(next(events).data, models.StartEvent)
    with pytest.raises(AtlusError) as error:
        list(events)
    assert (error.value.code, error.value.status) == (ErrorCode.UPSTREAM_ERROR, 502)


def test_a_turn_that_is_cancelled_in_its_stream_raises(world: World) -> None:
    client = world.connect("modelled")
    events = stream(client, request(client, model="silent"))
    start = next(events).data
    assert isinstance(start, models.StartEvent)
    cancel_turn.sync(client=client, session_id=start.session_id, turn=start.turn)
    with pytest.raises(AtlusError) as error:
        list(events)
    assert error.value.code is ErrorCode.TURN_CANCELLED


def test_a_stream_that_never_begins_raises(world: World) -> None:
    refused = stream(world.connect("open"), models.ChatRequest(session_id="session_0000000000000000", message="Hi"))
    with pytest.raises(AtlusError) as error:
        next(refused)
    assert error.value.code is ErrorCode.INVALID_SESSION
    with pytest.raises(httpx.ConnectError):
        # Nobody listens there.
        next(stream(connect("http://127.0.0.1:9"), models.ChatRequest(message="Hi")))
