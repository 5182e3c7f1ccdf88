"""A service of adapters over an engine that only keeps books; the rest of it is real."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_runtime import FakeRuntime, MakeService, Run, Test

from hydraserve.adapters.ingest import Ingester
from hydraserve.adapters.registry import Registry
from hydraserve.adapters.requirements import Requirements
from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.sources import DownloadCache, SourcePolicy
from hydraserve.adapters.store import AdapterStore
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.server.lifecycle.host_cache import HostCache
from hydraserve.server.lifecycle.reader import AdapterReader
from hydraserve.server.lifecycle.service import AdapterService

SHAPES = {f"model.layers.{i}.self_attn.q_proj": (64, 64) for i in range(2)}


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    return AdapterStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def ingester(store: AdapterStore) -> Iterator[Ingester]:
    sizes = asyncio.run(FakeRuntime().sizes())
    ingester = Ingester(store, Requirements(SHAPES, sizes.capacity, sizes.targets))
    ingester.start()  # here, as the reader ends with the thread that starts it
    yield ingester
    ingester.close()


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of adapters of different content."""
    folder = tmp_path_factory.mktemp("versions")
    for seed in range(4):
        save_adapter(make_adapter(SHAPES, ("q_proj",), 4, 3, seed=seed), folder / f"v{seed}")
    return [folder / f"v{seed}" for seed in range(4)]


@pytest.fixture
def make_service(store: AdapterStore, ingester: Ingester, tmp_path: Path) -> MakeService:
    def make(runtime: FakeRuntime, allowed: Path) -> AdapterService:
        policy = SourcePolicy.of([str(allowed)])
        reader = AdapterReader(store, ingester, policy, tmp_path, DownloadCache(tmp_path / "downloads"))
        cache = HostCache(runtime, runtime.host_adapters)
        return AdapterService(runtime, Registry(), reader, cache, runtime.slots, taken=["base"])

    return make


@pytest.fixture
def run(make_service: MakeService, versions: list[Path]) -> Run:
    """Run a test with a service of 2 slots and 3 places in host memory, which no request holds at the end."""

    def run(test: Test) -> None:
        async def whole() -> None:
            runtime = FakeRuntime(slots=2, host_adapters=3)
            service = make_service(runtime, versions[0].parent)
            await test(service, runtime)
            assert service.turnstile.active == 0
            await service.close()

        asyncio.run(asyncio.wait_for(whole(), 60))

    return run
