"""Every error code of the contract, brought about on a real server and raised as a typed error."""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from atlus_client import AtlusError, Connection, ErrorCode, connect, models, ok, pages, stream
from atlus_client.generated.api.chat import chat
from atlus_client.generated.api.keys import list_keys, revoke_key
from atlus_client.generated.api.sessions import (
    continue_session,
    create_session,
    get_session,
    list_sessions,
    update_session,
)
from atlus_client.generated.api.turns import cancel_turn, get_turn
from atlus_client.generated.api.users import get_user
from conftest import World

NOBODY = "session_0000000000000000"


def new_session(client: Connection) -> str:
    return ok(create_session.sync(client=client, body=models.NewSession())).data.session_id


def say(client: Connection, message: str = "Hello", **fields: object) -> models.ChatAnswer:
    return ok(chat.sync(client=client, body=models.ChatRequest.from_dict({"message": message, **fields}))).data


@contextlib.contextmanager
def busy(client: Connection) -> Iterator[models.StartEvent]:
    """A session whose turn runs meanwhile."""
    ask = models.ChatRequest(session_id=new_session(client), message="Hello", model="silent")
    events = stream(client, ask)
    start = next(events).data
    assert isinstance(start, models.StartEvent)
    yield start


def content_type(world: World) -> None:
    world.connect("open").get_httpx_client().post("/api/v1/chat", content=b"Hello")


def bad_json(world: World) -> None:
    headers = {"Content-Type": "application/json"}
    world.connect("open").get_httpx_client().post("/api/v1/chat", content=b"{", headers=headers)


def stalled(world: World) -> None:
    def half() -> Iterator[bytes]:
        yield b"{"
        time.sleep(31)

    headers = {"Content-Type": "application/json"}
    world.connect("open").get_httpx_client().post("/api/v1/chat", content=half(), headers=headers)


def session_busy(world: World) -> None:
    client = world.connect("modelled")
    with busy(client) as start:
        say(client, session_id=start.session_id, on_busy="reject")


def turn_cancelled(world: World) -> None:
    client = world.connect("modelled")
    session_id = new_session(client)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(say, client, session_id=session_id, model="silent")
        while True:
            # Until the turn runs.
            with contextlib.suppress(AtlusError):
                cancel_turn.sync(client=client, session_id=session_id, turn=1)
                break
        waiting.result()


def turn_not_running(world: World) -> None:
    client = world.connect("open")
    answer = say(client)
    cancel_turn.sync(client=client, session_id=answer.session_id, turn=answer.turn)


def in_progress(world: World) -> None:
    client, key = world.connect("modelled"), str(uuid.uuid4())
    ask = models.ChatRequest(session_id=new_session(client), message="Hello", model="silent")
    next(stream(client, ask, idempotency_key=key))
    next(stream(client, ask, idempotency_key=key))


def key_reused(world: World) -> None:
    client, key = world.connect("open"), str(uuid.uuid4())
    for message in ("one", "two"):
        chat.sync(client=client, body=models.ChatRequest(message=message), idempotency_key=key)


def precondition(world: World) -> None:
    client = world.connect("open")
    body = models.SessionChange(title="Names")
    update_session.sync(client=client, session_id=new_session(client), body=body, if_match='"0000000000000000"')


def rate_limit(world: World) -> None:
    client = world.connect("limited")
    for _ in range(2):
        list(pages(list_sessions.sync, client=client))


def token_budget(world: World) -> None:
    client, user_id = world.connect("budgeted"), f"user_{uuid.uuid4()}"
    for _ in range(2):
        say(client, user_id=user_id)


def overloaded(world: World) -> None:
    client = world.connect("crowded")

    def attempt(_: int) -> AtlusError | None:
        try:
            say(client)
        except AtlusError as error:
            return error
        return None

    # One runs and four wait.
    with ThreadPoolExecutor(6) as threads:
        errors = [error for error in threads.map(attempt, range(6)) if error]
    raise next(error for error in errors if error.code is ErrorCode.OVERLOADED)


# Each by what brings it about, with its status and whether it says when to try again.
TABLE: dict[ErrorCode, tuple[int, bool, Callable[[World], object]]] = {
    ErrorCode.INVALID_CONTENT_TYPE: (400, False, content_type),
    ErrorCode.INVALID_JSON: (400, False, bad_json),
    ErrorCode.VALIDATION_ERROR: (400, False, lambda w: list_sessions.sync(client=w.connect("open"), limit=0)),
    ErrorCode.INVALID_REQUEST: (400, False, lambda w: say(w.connect("open"), " ")),
    ErrorCode.MESSAGE_TOO_LONG: (400, False, lambda w: say(w.connect("open"), "x" * 32_001)),
    ErrorCode.INVALID_CURSOR: (400, False, lambda w: list_sessions.sync(client=w.connect("open"), cursor="made-up")),
    ErrorCode.UNAUTHORIZED: (401, False, lambda w: list_sessions.sync(client=connect(w.servers["keyed"]))),
    ErrorCode.FORBIDDEN: (403, False, lambda w: say(connect(w.servers["keyed"], w.read_key))),
    ErrorCode.SESSION_NOT_FOUND: (404, False, lambda w: get_session.sync(client=w.connect("open"), session_id=NOBODY)),
    ErrorCode.INVALID_SESSION: (404, False, lambda w: say(w.connect("open"), session_id=NOBODY)),
    ErrorCode.NO_SESSION_FOUND: (
        404,
        False,
        lambda w: continue_session.sync(client=w.connect("open"), user_id="user_nobody"),
    ),
    ErrorCode.TURN_NOT_FOUND: (
        404,
        False,
        lambda w: get_turn.sync(client=(c := w.connect("open")), session_id=new_session(c), turn=1),
    ),
    ErrorCode.USER_NOT_FOUND: (404, False, lambda w: get_user.sync(client=w.connect("open"), user_id="user_nobody")),
    ErrorCode.KEY_NOT_FOUND: (
        404,
        False,
        lambda w: revoke_key.sync(client=w.connect("keyed"), key_id="key_0000000000000000"),
    ),
    ErrorCode.NOT_FOUND: (404, False, lambda w: w.connect("open").get_httpx_client().get("/api/v1/nothing")),
    ErrorCode.METHOD_NOT_ALLOWED: (405, False, lambda w: w.connect("open").get_httpx_client().put("/api/v1/chat")),
    ErrorCode.REQUEST_TIMEOUT: (408, False, stalled),
    ErrorCode.SESSION_BUSY: (409, True, session_busy),
    ErrorCode.TURN_CANCELLED: (409, False, turn_cancelled),
    ErrorCode.TURN_NOT_RUNNING: (409, False, turn_not_running),
    ErrorCode.IDEMPOTENCY_IN_PROGRESS: (409, True, in_progress),
    ErrorCode.PRECONDITION_FAILED: (412, False, precondition),
    ErrorCode.PAYLOAD_TOO_LARGE: (413, False, lambda w: say(w.connect("open"), "x" * 1_100_000)),
    ErrorCode.IDEMPOTENCY_KEY_REUSED: (422, False, key_reused),
    ErrorCode.RATE_LIMIT_EXCEEDED: (429, True, rate_limit),
    ErrorCode.TOKEN_BUDGET_EXCEEDED: (429, True, token_budget),
    ErrorCode.INTERNAL_ERROR: (500, False, lambda w: list_keys.sync(client=w.connect("damaged"))),
    ErrorCode.UPSTREAM_ERROR: (502, False, lambda w: say(w.connect("modelled"), model="broken")),
    ErrorCode.UPSTREAM_UNAVAILABLE: (503, True, lambda w: say(w.connect("modelled"), model="patient")),
    ErrorCode.OVERLOADED: (503, True, overloaded),
    ErrorCode.DATABASE_UNAVAILABLE: (503, True, lambda w: new_session(w.connect("locked"))),
    ErrorCode.UPSTREAM_TIMEOUT: (504, False, lambda w: say(w.connect("modelled"), model="silent")),
}


def caught(work: Callable[[World], object], world: World) -> AtlusError:
    with pytest.raises(AtlusError) as error:
        work(world)
    return error.value


@pytest.fixture(scope="session")
def errors(world: World) -> Iterator[dict[ErrorCode, Callable[[], AtlusError]]]:
    """All at once, since some take their time."""
    with ThreadPoolExecutor(len(TABLE)) as threads:
        running = {code: threads.submit(caught, work, world) for code, (_, _, work) in TABLE.items()}
        yield {code: future.result for code, future in running.items()}


def test_the_table_holds_every_code() -> None:
    assert set(TABLE) == set(ErrorCode)


@pytest.mark.parametrize("code", TABLE)
def test_a_failure_is_a_typed_error(code: ErrorCode, errors: dict[ErrorCode, Callable[[], AtlusError]]) -> None:
    status, retry, _ = TABLE[code]
    error = errors[code]()
    assert error.code is code
    assert error.status == status
    assert error.message and error.request_id
    assert (error.retry_after is not None) == retry


def test_an_error_names_the_field(world: World) -> None:
    error = caught(lambda w: list_sessions.sync(client=w.connect("open"), limit=0), world)
    assert [detail.field for detail in error.details] == ["limit"]


def test_an_answer_that_is_not_the_servers_is_an_error_without_a_code() -> None:
    for answer in (httpx.Response(502, text="<html>Bad gateway</html>"), httpx.Response(502, json={"error": "Bad"})):
        error = AtlusError.of(answer)
        assert (error.code, error.status, error.details) == (None, 502, [])


def test_a_code_that_is_newer_than_the_client_is_none() -> None:
    told = {"success": False, "error": {"code": "SOMETHING_NEW", "message": "New", "status": 418}}
    error = AtlusError.of(httpx.Response(418, json=told))
    assert (error.code, error.status, error.message) == (None, 418, "New")
