"""What the tests of the cookbook's Python programs share: the server that scripts/test-cookbook has started."""

import os
from pathlib import Path

import httpx
import pytest

COOKBOOK = Path(__file__).parents[2] / "docs" / "cookbook"


@pytest.fixture
def atlus():
    """ATLUS as the programs find it, by ATLUS_SERVER and ATLUS_API_KEY."""
    headers = {"Authorization": f"Bearer {os.environ['ATLUS_API_KEY']}"}
    with httpx.Client(base_url=f"{os.environ['ATLUS_SERVER']}/api/v1", headers=headers) as client:
        yield client


@pytest.fixture
def turns_of(atlus):
    """Message and answer of each turn of a session."""

    def turns_of(session):
        page = atlus.get(f"/sessions/{session}/turns", params={"limit": 100}).raise_for_status().json()["data"]
        return [(turn["message"], turn["response"]) for turn in page["items"]]

    return turns_of
