"""The servers that `clients/tests/world.py` has started."""

import json
import os
from typing import Any

import pytest
from atlus_client import Connection, connect


class World:
    def __init__(self, told: dict[str, Any]) -> None:
        self.servers: dict[str, str] = told["servers"]
        self.key: str = told["key"]
        self.read_key: str = told["read_key"]
        self.slow_text: str = told["slow_text"]

    def connect(self, server: str) -> Connection:
        return connect(self.servers[server], self.key if server == "keyed" else None)


@pytest.fixture(scope="session")
def world() -> World:
    return World(json.loads(os.environ["ATLUS_TEST_WORLD"]))


@pytest.fixture(params=["open", "keyed"])
def client(request: pytest.FixtureRequest, world: World) -> Connection:
    """A connection to a server without keys, then to one that asks for them."""
    return world.connect(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Errors first, since they are brought about in the background, and the one that takes half a minute last."""
    items.sort(key=lambda item: ("REQUEST_TIMEOUT" in item.name, item.path.name != "test_errors.py"))
