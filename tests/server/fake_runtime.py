"""An engine that only keeps books: what `AdapterRuntime` is asked for, without vLLM."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra_kernels import SlotCapacity

from hydraserve.adapters.runtime import EngineSizes, RequestHooks, Residency
from hydraserve.adapters.store import StoredAdapter
from hydraserve.errors import HydraServeError
from hydraserve.server.lifecycle.service import AdapterService


class FakeRuntime:
    """host: id -> digest of what is in host memory. gate: while cleared, loads do not end. running: id -> requests."""

    def __init__(self, slots: int = 2, host_adapters: int = 3) -> None:
        self.slots, self.host_adapters = slots, host_adapters
        self.host: dict[int, str] = {}
        self.pinned: set[int] = set()
        self.running: Counter[int] = Counter()
        self.evicted: list[str] = []
        self.aborted: list[str] = []
        self.loads: list[str] = []
        self.failing: dict[str, HydraServeError] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.hooks: RequestHooks | None = None
        self._ids = 0

    async def sizes(self) -> EngineSizes:
        return EngineSizes(self.slots, self.host_adapters, SlotCapacity(rows=20, k=64, heads=4), ("q_proj",))

    def new_id(self) -> int:
        self._ids += 1
        return self._ids

    def request(self, adapter: str, adapter_id: int, path: str) -> Any:
        return (adapter, adapter_id, path)

    def publish(self, models: Any, requests: Any, name_of: Any) -> None:
        self.published = requests

    async def load(self, adapter_id: int, path: str, digest: str) -> None:
        self.loads.append(digest)
        await self.gate.wait()
        if digest in self.failing:
            raise self.failing[digest]
        self.host[adapter_id] = digest
        assert len(self.host) <= self.host_adapters, "more in host memory than there is room for"

    async def unload(self, adapter_id: int) -> None:
        self.host.pop(adapter_id, None)
        self.pinned.discard(adapter_id)

    async def pin(self, adapter_id: int, pinned: bool) -> None:
        (self.pinned.add if pinned else self.pinned.discard)(adapter_id)
        self._check_slots()

    @contextmanager
    def run(self, adapter_id: int) -> Iterator[None]:
        """A request that is in the engine."""
        self.running[adapter_id] += 1
        self._check_slots()
        try:
            yield
        finally:
            self.running[adapter_id] -= 1
            self.running += Counter()

    def _check_slots(self) -> None:
        taken = self.pinned | set(self.running)
        assert len(taken) <= self.slots, f"{sorted(taken)} need a slot, there are {self.slots}: the engine would end"

    async def evict_blocks(self, adapter: str) -> int:
        self.evicted.append(adapter)
        return 1

    async def residency(self) -> Residency:
        host = dict.fromkeys(self.host, 1000)
        return Residency(host, (None,) * self.slots, blocks=10, free_blocks=10, cached_blocks=0, process_bytes=1)

    async def abort(self, request_ids: Iterable[str]) -> None:
        self.aborted += request_ids


# Of the fixture `make_service`: an engine, and the folder that adapters may come from.
MakeService = Callable[[FakeRuntime, Path], AdapterService]
Test = Callable[[AdapterService, FakeRuntime], Awaitable[None]]
Run = Callable[[Test], None]


def stored(name: str) -> StoredAdapter:
    """Content that is told apart by `name`; nothing of it is on disk."""
    digest = name.encode().hex().ljust(64, "0")
    return StoredAdapter(digest, f"/store/{digest}.safetensors", "lora", 4, 1, ("q_proj",), 1, 1000, ("float32",), None)
