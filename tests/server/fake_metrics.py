"""An engine and a service that say what a test of metrics wants, and everything between them and the series."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from hydraserve.adapters.observation import EngineCounts, RequestEnd, RouterCount, SlotCounts
from hydraserve.adapters.runtime import EngineSizes, Residency
from hydraserve.metrics import Metrics
from hydraserve.server.metrics.series import ServerMetrics

NOTHING = EngineCounts({}, 0, SlotCounts())


class Engine:
    """`EngineObservation`, as far as metrics ask it."""

    def __init__(self) -> None:
        self.observer: Any = None
        self.counts: list[EngineCounts | Exception] = []
        self.in_flight: dict[str | None, tuple[int, int]] = {}

    async def take_counts(self) -> EngineCounts:
        found = self.counts.pop(0) if self.counts else NOTHING
        if isinstance(found, Exception):
            raise found
        return found

    def requests(self) -> Mapping[str | None, tuple[int, int]]:
        return self.in_flight


class Service:
    def __init__(self) -> None:
        self.current: dict[str, Any] = {}
        self.registry = SimpleNamespace(find=lambda name: name if name in self.registered else None)
        self.registered: set[str] = set()
        self.cache = SimpleNamespace(ready=lambda digest: digest == "ready")
        self.held = Residency(host={}, slots=(None, None), blocks=0, free_blocks=0, cached_blocks=0, process_bytes=0)

    def serve(self, name: str, adapter_id: int, waiting: int = 0) -> None:
        stored = SimpleNamespace(digest=name)
        self.registered.add(name)
        self.current[name] = SimpleNamespace(adapter_id=adapter_id, waiting=waiting, stored=stored)

    async def residency(self) -> Residency:
        return self.held


class Hooks:
    """`RequestHooks` whose adapters become ready when a test says so, or do not."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def ready(self, model: str) -> None:
        await self.gate.wait()
        if self.error is not None:
            raise self.error


class Runtime:
    hooks: Any = None

    async def load(self, adapter_id: int, path: str, digest: str) -> None: ...

    async def unload(self, adapter_id: int) -> None: ...


class Server:
    """Everything together, and a clock that only a test moves."""

    def __init__(self, size: int = 3) -> None:
        self.registry, self.now = CollectorRegistry(), 0.0
        self.engine, self.service = Engine(), Service()
        self.metrics = ServerMetrics(self.engine, Metrics(self.registry), size, lambda: self.now)  # type: ignore[arg-type]
        self.runtime = self.metrics.meter(Runtime())  # type: ignore[arg-type]

    async def start(self) -> None:
        await self.metrics.start(self.service, EngineSizes(2, 4, None, ()))  # type: ignore[arg-type]

    async def refresh(self) -> None:
        self.now += 1.0
        await self.metrics.refresh()

    def request(self, adapter: str | None, outcome: str = "stop") -> None:
        begun = self.engine.observer.begin(None if adapter is None else f"{adapter}@d1")
        self.engine.observer.end(begun, RequestEnd(outcome, 5, 7, 2.0, 0.5, 0.25))

    def engine_hooks(self) -> Any:
        """What the engine calls."""
        return self.runtime.hooks

    def waiting(self) -> float:
        families = self.registry.collect()
        name = "hydraserve_adapter_requests_waiting"
        return sum(sample.value for family in families if family.name == name for sample in family.samples)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"hydraserve_{name}", labels)

    def adapters(self) -> set[str]:
        families = self.registry.collect()
        return {s.labels["adapter"] for family in families for s in family.samples if "adapter" in s.labels}


def counted(adapter_id: int, tokens: int, *weights: float, slots: SlotCounts | None = None) -> EngineCounts:
    routers = {f"layers.{i}.mlp.up_proj": RouterCount(tokens, weights, 0.5 * tokens) for i in range(2)}
    return EngineCounts({adapter_id: routers}, 3, slots or SlotCounts())
