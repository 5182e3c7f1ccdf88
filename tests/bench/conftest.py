"""The fake server that the benchmark's tests drive."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_server import FakeServer, serving


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    with serving() as server:
        yield server
