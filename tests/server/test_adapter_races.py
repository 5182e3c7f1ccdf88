"""Everything that can be done to adapters at once, in random order, over an engine that takes its time and fails.

Names share contents on purpose: what is kept by name and what is kept by content must not end each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from fake_runtime import FakeRuntime, MakeService

from hydraserve.adapters.compose import Recipe
from hydraserve.adapters.registry import Origin
from hydraserve.adapters.store import AdapterStore
from hydraserve.errors import AdapterConflictError, AdapterNotFoundError, EngineError, UnknownAdapterError
from hydraserve.server.lifecycle.admission import Admission
from hydraserve.server.lifecycle.served import RequestScope, VisibleAdapters, current_scope
from hydraserve.server.lifecycle.service import AdapterService

NAMES = [f"n{i}" for i in range(6)]
DERIVED = ["uniform", "head=1", "top_k=1"]


class SlowRuntime(FakeRuntime):
    """Each call lets others pass, for a random while."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(slots=2, host_adapters=3)
        self.rng = rng

    async def pause(self) -> None:
        await asyncio.sleep(self.rng.choice([0, 0, 0.001, 0.004]))

    async def load(self, adapter_id: int, path: str, digest: str) -> None:
        assert Path(path).is_file(), "taken out of the store before it was loaded"
        await self.pause()
        if self.rng.random() < 0.05:
            raise EngineError("load", got="a failure of the engine")
        await super().load(adapter_id, path, digest)
        await self.pause()

    async def unload(self, adapter_id: int) -> None:
        await self.pause()
        await super().unload(adapter_id)
        await self.pause()

    async def pin(self, adapter_id: int, pinned: bool) -> None:
        assert adapter_id in self.host or not pinned
        await super().pin(adapter_id, pinned)
        assert len(self.pinned) < self.slots, "no slot is left for the others"
        await self.pause()

    async def evict_blocks(self, adapter: str) -> int:
        await self.pause()
        return await super().evict_blocks(adapter)


class Traffic:
    """Clients that load, replace, remove, pin and use adapters, and count how that ended."""

    def __init__(self, service: AdapterService, runtime: SlowRuntime, versions: list[Path], seed: int) -> None:
        self.service, self.runtime, self.versions = service, runtime, versions
        self.rng = random.Random(seed)
        self.admission = Admission(service)
        self.ended: Counter[str] = Counter()
        self._requests = 0

    async def run(self, clients: int, each: int) -> None:
        await asyncio.gather(*(self._client(each) for _ in range(clients)))

    async def _client(self, count: int) -> None:
        service, rng = self.service, self.rng
        kinds: dict[str, tuple[int, Callable[[str], Awaitable[object]]]] = {
            "add": (4, lambda name: service.add(name, self._source(), pin=rng.random() < 0.1)),
            "register": (1, self._register),
            "compose": (3, lambda name: service.replace(name, self._recipe())),
            "replace": (3, lambda name: service.replace(name, self._source())),
            "remove": (4, lambda name: service.remove(name, force=rng.random() < 0.5, wait=rng.random() < 0.8)),
            "pin": (1, lambda name: service.pin(name, True)),
            "unpin": (1, lambda name: service.pin(name, False)),
            "prefetch": (1, service.prefetch),
            "request": (9, self._request),
            "request given up": (2, self._give_up),
        }
        for _ in range(count):
            (kind,) = rng.choices(list(kinds), [weight for weight, _ in kinds.values()])
            try:
                await kinds[kind][1](rng.choice(NAMES))
                self.ended[kind] += 1
            except (AdapterConflictError, AdapterNotFoundError, UnknownAdapterError):
                self.ended[f"{kind} refused"] += 1
            except EngineError:
                self.ended[f"{kind} failed"] += 1

    def _source(self) -> str:
        return str(self.rng.choice([*self.versions[:3], self.versions[0].parent / "missing"]))

    def _recipe(self) -> str:
        name = self.rng.choice(NAMES) + self.rng.choice(["", "", "@uniform"])
        return Recipe(((name, 0.5),)).source

    async def _register(self, name: str) -> None:
        self.service.register(name, self._source(), Origin.API)

    async def _give_up(self, name: str) -> None:
        """The client goes away at some point."""
        request = asyncio.create_task(self._request(name))
        await asyncio.sleep(self.rng.random() * 0.03)
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await request

    async def _request(self, name: str) -> None:
        """As vLLM's handlers do: make ready, look up, admit."""
        self._requests += 1
        request_id = f"r{self._requests}"
        if self.rng.random() < 0.2:
            name = f"{name}@{self.rng.choice(DERIVED)}"
        scope = RequestScope()
        current_scope.set(scope)
        try:
            await self.admission.ready(name)
            visible = VisibleAdapters(self.service.current)
            if name not in visible:
                raise UnknownAdapterError(what="adapter", got=name, expected="one that is served")
            label, adapter_id, _ = visible[name]
            digest = self.service.contents.labelled(label).stored.digest
            async with self.admission.admit(adapter_id, label, request_id):
                with self.runtime.run(adapter_id):
                    for _ in range(self.rng.randrange(4)):
                        assert self.runtime.host[self.service.cache.adapter_id(digest)] == digest
                        await self.runtime.pause()
        finally:
            scope.end()


@pytest.mark.parametrize("seed", range(8))
def test_in_any_order_nothing_breaks_and_nothing_is_left(
    make_service: MakeService, versions: list[Path], store: AdapterStore, seed: int
) -> None:
    async def test() -> None:
        before = set(store.digests())
        runtime = SlowRuntime(random.Random(seed))
        service = make_service(runtime, versions[0].parent)
        failures: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        traffic = Traffic(service, runtime, versions, seed)
        await traffic.run(clients=12, each=25)
        assert {"add", "replace", "remove", "compose", "request"} <= set(traffic.ended), traffic.ended
        for entry in service.registry:
            if service.registry.find(entry.name) is entry:
                await service.remove(entry.name)
        while service.tasks.running:
            await asyncio.gather(*service.tasks.running)
        assert failures == []
        assert (runtime.host, runtime.pinned, service.current, service.turnstile.active) == ({}, set(), {}, 0)
        assert set(store.digests()) <= before

    asyncio.run(asyncio.wait_for(test(), 120))
