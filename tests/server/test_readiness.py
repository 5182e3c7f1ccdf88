"""When a server asks for requests, and that it does not come up without what it was told to serve."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_runtime import FakeRuntime, MakeService

from hydraserve.errors import AdapterError
from hydraserve.server.health import Readiness
from hydraserve.server.lifecycle.directory import AdapterDirectory
from hydraserve.server.traffic import Traffic


def test_ready_until_the_engine_or_the_server_ends() -> None:
    traffic, dead = Traffic(limit=1), [False]
    readiness = Readiness(traffic, lambda: dead[0])
    assert readiness.obstacle() is None
    with traffic.request():
        assert readiness.obstacle() is None, "a full server is asked again in a moment"
    traffic.drain(0)
    assert readiness.obstacle() == "draining"
    dead[0] = True
    assert readiness.obstacle() == "the engine has ended"


def test_a_directory_that_cannot_be_listed_ends_the_start(make_service: MakeService, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for broken in (tmp_path / "missing", tmp_path / "file"):
        service = make_service(FakeRuntime(slots=2, host_adapters=8), tmp_path)
        with pytest.raises(AdapterError, match="expected a folder"):
            AdapterDirectory(service, broken).register()
