"""What the generated code does not do: keys, failures as exceptions, pages to the end, and streams."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, Self, TypeVar

import httpx
from httpx_sse import EventSource, ServerSentEvent

from .generated.api.chat import chat_stream
from .generated.api.turns import stream_turn
from .generated.client import Client
from .generated.models import ChatAnswer, ChatRequest, DeltaEvent, ErrorCode, ErrorDetail, StartEvent
from .generated.types import UNSET, Unset

T = TypeVar("T")
P = ParamSpec("P")

# A message waits at most 60 seconds for its session, then, unless the server is set otherwise, 120 for its model.
_TIMEOUT = httpx.Timeout(200, connect=10)
# A stream shows a sign of life every 15 seconds, but its message may wait for 60 before it begins.
_STREAM_TIMEOUT = httpx.Timeout(90, connect=10)


class AtlusError(Exception):
    """A failure that the server told."""

    code: ErrorCode | None
    """What to branch on. None if the answer came from something between, or from a server newer than this client."""
    status: int
    message: str
    details: list[ErrorDetail]
    request_id: str | None
    retry_after: float | None
    """Seconds after which trying again may help."""

    def __init__(self, told: Any, status: int, headers: httpx.Headers) -> None:
        told = told if isinstance(told, dict) and told.get("success") is False else {}
        error = told.get("error", {})
        name = error.get("code")
        self.code = ErrorCode(name) if name in list(ErrorCode) else None
        self.status = error.get("status", status)
        self.message = error.get("message") or f"The answer has the status {status}"
        self.details = [ErrorDetail.from_dict(detail) for detail in error.get("details", [])]
        self.request_id = told.get("request_id") or headers.get("x-request-id")
        wait = headers.get("retry-after", "")
        self.retry_after = float(wait) if wait.isdecimal() else None
        super().__init__(f"{self.message} ({name or status})")

    @classmethod
    def of(cls, response: httpx.Response) -> Self:
        """What a response that was read tells."""
        try:
            told = response.json()
        except ValueError:
            told = None
        return cls(told, response.status_code, response.headers)


def _fails(response: httpx.Response) -> bool:
    # An unhealthy server describes its health, as a healthy one does.
    return response.is_error and not response.url.path.endswith("/api/v1/health")


def _raise(response: httpx.Response) -> None:
    if _fails(response):
        response.read()
        raise AtlusError.of(response)


async def _araise(response: httpx.Response) -> None:
    if _fails(response):
        await response.aread()
        raise AtlusError.of(response)


class Connection(Client):
    """The generated client, but that every failure is raised as an `AtlusError`."""

    def get_httpx_client(self) -> httpx.Client:
        client = super().get_httpx_client()
        client.event_hooks = {"response": [_raise]}
        return client

    def get_async_httpx_client(self) -> httpx.AsyncClient:
        client = super().get_async_httpx_client()
        client.event_hooks = {"response": [_araise]}
        return client


def connect(server: str | None = None, key: str | None = None) -> Connection:
    """Speaks to a server, and shows it a key.

    Without arguments they are taken from `ATLUS_SERVER` and `ATLUS_API_KEY`, as `atlus chat` does; the server is
    http://127.0.0.1:5000 if nothing names another.
    """
    server = server or os.environ.get("ATLUS_SERVER") or "http://127.0.0.1:5000"
    key = key or os.environ.get("ATLUS_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return Connection(base_url=server.rstrip("/"), headers=headers, timeout=_TIMEOUT)


def ok(answer: T | None) -> T:
    """What a call answered. Failures are raised by the call itself."""
    if answer is None:
        raise TypeError("the server answered with a status that its document does not name")
    return answer


# --- Pages ----------------------------------------------------------------------------------------------------------


class _Items(Protocol[T]):
    @property
    def items(self) -> list[T]: ...

    @property
    def next_cursor(self) -> str | None: ...


class _Page(Protocol[T]):
    @property
    def data(self) -> _Items[T]: ...


def pages(listing: Callable[P, _Page[T] | None], *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
    """Every item of a listing, page by page: `pages(list_sessions.sync, client=client, user_id="user_123")`."""
    while True:
        page = ok(listing(*args, **kwargs)).data
        yield from page.items
        if not page.next_cursor:
            return
        kwargs["cursor"] = page.next_cursor


async def apages(
    listing: Callable[P, Awaitable[_Page[T] | None]], *args: P.args, **kwargs: P.kwargs
) -> AsyncIterator[T]:
    """The same for `list_sessions.asyncio`."""
    while True:
        page = ok(await listing(*args, **kwargs)).data
        for item in page.items:
            yield item
        if not page.next_cursor:
            return
        kwargs["cursor"] = page.next_cursor


# --- Streams --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """A piece of news of a turn."""

    id: int
    """The offset in the reply that follows it, in bytes; `resume` takes it as `last_event_id`."""
    data: StartEvent | DeltaEvent | ChatAnswer

    @property
    def text(self) -> str:
        """What it adds to the reply: nothing, unless it is a `DeltaEvent`."""
        return self.data.text if isinstance(self.data, DeltaEvent) else ""


@dataclass
class _Stream:
    """Where a stream is, and how it goes on if its connection breaks."""

    request: dict[str, Any]
    session_id: str | None = None
    turn: int = 0
    broke: int = 0
    over: bool = False

    def hear(self, sse: ServerSentEvent, headers: httpx.Headers) -> Event | None:
        """What an event says; None for one of a kind that this client does not know."""
        data: Any = sse.json() if sse.event in ("start", "delta", "done", "error") else None
        if sse.event == "error":
            # The headers were sent before it failed: they tell nothing of it but the request's id.
            raise AtlusError(data, data["error"]["status"], headers)
        told: StartEvent | DeltaEvent | ChatAnswer
        if sse.event == "start":
            told = StartEvent.from_dict(data)
            self.session_id, self.turn = told.session_id, told.turn
        elif sse.event == "delta":
            told = DeltaEvent.from_dict(data)
        elif sse.event == "done":
            told = ChatAnswer.from_dict(data)
            self.over = True
        else:
            return None
        self.broke = 0
        self._go_on_after(int(sse.id))
        return Event(int(sse.id), told)

    def _go_on_after(self, last: int) -> None:
        if self.session_id is not None:
            self.request = stream_turn._get_kwargs(self.session_id, self.turn, last_event_id=last)

    def wait(self, error: httpx.TransportError, resumes: int) -> float:
        """Seconds until it may go on; raises the error if it cannot."""
        self.broke += 1
        # Before `start` nobody knows whether the message arrived: whoever gave an Idempotency-Key sends it again.
        if self.session_id is None or self.broke > resumes:
            raise error
        return 0.0 if self.broke == 1 else 0.25 * 2.0**self.broke

    def kwargs(self) -> dict[str, Any]:
        return {**self.request, "timeout": _STREAM_TIMEOUT}


def _ended_early() -> httpx.TransportError:
    return httpx.RemoteProtocolError("the stream ended before its turn did")


def _listen(client: Client, stream: _Stream, resumes: int) -> Iterator[Event]:
    while not stream.over:
        try:
            with client.get_httpx_client().stream(**stream.kwargs()) as response:
                for sse in EventSource(response).iter_sse():
                    if event := stream.hear(sse, response.headers):
                        yield event
            if not stream.over:
                raise _ended_early()
        except httpx.TransportError as error:
            time.sleep(stream.wait(error, resumes))


async def _alisten(client: Client, stream: _Stream, resumes: int) -> AsyncIterator[Event]:
    while not stream.over:
        try:
            async with client.get_async_httpx_client().stream(**stream.kwargs()) as response:
                async for sse in EventSource(response).aiter_sse():
                    if event := stream.hear(sse, response.headers):
                        yield event
            if not stream.over:
                raise _ended_early()
        except httpx.TransportError as error:
            await asyncio.sleep(stream.wait(error, resumes))


def _asked(body: ChatRequest, idempotency_key: str | None) -> _Stream:
    return _Stream(chat_stream._get_kwargs(body=body, idempotency_key=idempotency_key or UNSET))


def _resumed(session_id: str, turn: int, last_event_id: int | None) -> _Stream:
    last: int | Unset = UNSET if last_event_id is None else last_event_id
    return _Stream(stream_turn._get_kwargs(session_id, turn, last_event_id=last), session_id, turn)


def stream(
    client: Client, body: ChatRequest, *, idempotency_key: str | None = None, resumes: int = 5
) -> Iterator[Event]:
    """Sends a message and tells its answer while it comes: `StartEvent`, `DeltaEvent`s, `ChatAnswer`.

    It is sent when the first event is asked for.
    A connection that breaks is resumed, without a piece of text missing or coming twice, and given up after `resumes`
    attempts in a row that brought nothing. A turn that fails raises an `AtlusError`.
    """
    return _listen(client, _asked(body, idempotency_key), resumes)


def astream(
    client: Client, body: ChatRequest, *, idempotency_key: str | None = None, resumes: int = 5
) -> AsyncIterator[Event]:
    """The same for `async for`."""
    return _alisten(client, _asked(body, idempotency_key), resumes)


def resume(
    client: Client, session_id: str, turn: int, last_event_id: int | None = None, *, resumes: int = 5
) -> Iterator[Event]:
    """Hears a turn's answer from the event after `last_event_id` on, or from the beginning."""
    return _listen(client, _resumed(session_id, turn, last_event_id), resumes)


def aresume(
    client: Client, session_id: str, turn: int, last_event_id: int | None = None, *, resumes: int = 5
) -> AsyncIterator[Event]:
    """The same for `async for`."""
    return _alisten(client, _resumed(session_id, turn, last_event_id), resumes)
