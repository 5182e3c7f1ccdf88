"""Fills the series of `hydraserve.metrics`: from requests as they end, and from the engine whenever somebody looks."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Counter
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from hydraserve.adapters.observation import EngineCounts, EngineObservation, RequestEnd
from hydraserve.adapters.runtime import AdapterRuntime, EngineSizes, RequestHooks, Residency
from hydraserve.errors import HydraServeError
from hydraserve.metrics import Metrics
from hydraserve.server.lifecycle.served import ServedAdapter, name_of
from hydraserve.server.metrics.collapse import CollapseWindows
from hydraserve.server.metrics.labels import OTHER, AdapterLabels

logger = logging.getLogger("hydraserve.server")

# Scrapes that follow one another sooner get what the engine said last.
MIN_INTERVAL_S = 1.0
# A step of the engine (a long prompt on a CPU) may take seconds; a scrape does not wait longer than this.
REFRESH_TIMEOUT_S = 5.0
STATES = ("slot", "host", "disk")


def shared_registry() -> CollectorRegistry | None:
    """With several API server processes, what merges the metrics of all of them; vLLM names the folder they share."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return None
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


class Service(Protocol):
    """What is needed of `AdapterService`."""

    @property
    def current(self) -> Mapping[str, ServedAdapter]: ...
    @property
    def cache(self) -> Any: ...
    async def residency(self) -> Residency: ...


@dataclass(frozen=True)
class _Begun:
    adapter: str | None
    label: str


class RequestMetrics:
    """`RequestObserver` of the engine: counts requests as they end."""

    def __init__(self, metrics: Metrics, labels: AdapterLabels) -> None:
        self._metrics, self._labels = metrics, labels

    def begin(self, adapter: str | None) -> _Begun:
        name = None if adapter is None else name_of(adapter)
        return _Begun(name, self._labels.enter(name))

    def end(self, begun: _Begun, end: RequestEnd) -> None:
        metrics, label = self._metrics, begun.label
        metrics.requests.labels(label, end.outcome).inc()
        metrics.prompt_tokens.labels(label).inc(end.prompt_tokens)
        metrics.generated_tokens.labels(label).inc(end.generated_tokens)
        metrics.request_seconds.labels(label).observe(end.seconds)
        if end.first_token is not None:
            metrics.first_token_seconds.labels(label).observe(end.first_token)
        if end.per_token is not None:
            metrics.token_seconds.labels(label).observe(end.per_token)
        self._labels.leave(begun.adapter, label)


class MeteredRuntime:
    """An `AdapterRuntime` whose loads into host memory, and requests' hits there, are counted.

    loads: (adapter id, seconds), unloads: adapter id, since they were last taken.
    """

    def __init__(self, runtime: AdapterRuntime, on_request: Callable[[str], None]) -> None:
        self._runtime, self._on_request = runtime, on_request
        self.loads: list[tuple[int, float]] = []
        self.unloads: list[int] = []

    @property
    def hooks(self) -> RequestHooks | None:
        return self._runtime.hooks

    @hooks.setter
    def hooks(self, hooks: RequestHooks | None) -> None:
        self._runtime.hooks = None if hooks is None else _MeteredHooks(hooks, self._on_request)

    async def load(self, adapter_id: int, path: str, digest: str) -> None:
        began = time.monotonic()
        await self._runtime.load(adapter_id, path, digest)
        self.loads.append((adapter_id, time.monotonic() - began))

    async def unload(self, adapter_id: int) -> None:
        await self._runtime.unload(adapter_id)
        self.unloads.append(adapter_id)

    async def sizes(self) -> EngineSizes:
        return await self._runtime.sizes()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)


class _MeteredHooks:
    """`RequestHooks` that tell of each request before its adapter is made ready."""

    def __init__(self, hooks: RequestHooks, on_request: Callable[[str], None]) -> None:
        self._hooks, self._on_request = hooks, on_request

    async def ready(self, model: str) -> None:
        self._on_request(model)
        await self._hooks.ready(model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hooks, name)


class ServerMetrics:
    """All of it. `service` is set when the adapters are there; `refresh` brings the engine's side up to date."""

    def __init__(
        self, engine: EngineObservation, metrics: Metrics, size: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine, self._metrics, self._clock = engine, metrics, clock
        self._shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._labels = AdapterLabels(size, retire=self._retire, removable=not self._shared)
        self._collectors: list[Collector] = []
        self._collapse = CollapseWindows()
        self._names: dict[int, str] = {}
        self._refreshed = float("-inf")
        self._refreshing: asyncio.Task[None] | None = None
        self.runtime: MeteredRuntime | None = None
        self.service: Service | None = None
        engine.observer = RequestMetrics(metrics, self._labels)

    def add(self, collector: Collector) -> None:
        """Show what this one collects, too."""
        if self._shared:
            self._collectors.append(collector)
        else:
            REGISTRY.register(collector)

    def registry(self) -> CollectorRegistry:
        """What /metrics shows, vLLM's series too."""
        shared = shared_registry()
        if shared is None:
            return REGISTRY
        for collector in self._collectors:
            shared.register(collector)
        return shared

    def note(self, adapter: str) -> None:
        """A request of another API server process uses this adapter: what the engine counts for it is shown here."""
        self._labels.leave(adapter, self._labels.enter(adapter))

    def meter(self, runtime: AdapterRuntime) -> MeteredRuntime:
        """The runtime, counted."""
        self.runtime = MeteredRuntime(runtime, self._on_request)
        return self.runtime

    async def start(self, service: Service, sizes: EngineSizes) -> None:
        """The adapters are there. What the engine counted while it warmed up is not traffic."""
        self.service = service
        self._metrics.slots.set(sizes.slots)
        self._metrics.host_cache_capacity.set(sizes.host_adapters)
        await self._engine.take_counts()

    async def refresh(self) -> None:
        """Ask the engine, unless that was just done; what cannot be had in time stays as it was."""
        if self.service is None or self._clock() - self._refreshed < MIN_INTERVAL_S:
            return
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        done, _ = await asyncio.wait([self._refreshing], timeout=REFRESH_TIMEOUT_S)
        for refreshed in done:
            if (error := refreshed.exception()) is not None:  # a fault of ours; the series that are there still tell
                logger.error("metrics: %r", error)

    async def _refresh(self) -> None:
        assert self.service is not None
        try:
            counts, residency = await asyncio.gather(self._engine.take_counts(), self.service.residency())
        except HydraServeError as error:
            logger.warning("metrics: %s", error)
            return
        self._refreshed = self._clock()
        self._names |= {served.adapter_id: name for name, served in self.service.current.items()}
        self._show_counts(counts)
        self._show_loads()
        self._show_residency(residency)
        self.show_requests()
        held = {*residency.host, *residency.slots}
        current = {served.adapter_id for served in self.service.current.values()}
        self._names = {i: name for i, name in self._names.items() if i in held or i in current}

    def _label(self, adapter_id: int) -> str:
        name = self._names.get(adapter_id)
        return OTHER if name is None else self._labels.find(name)

    def _on_request(self, model: str) -> None:
        served = None if self.service is None else self.service.current.get(model)
        if self.service is None or served is None:
            return
        hit = self.service.cache.ready(served.stored.digest)
        (self._metrics.host_cache_hits if hit else self._metrics.host_cache_misses).inc()

    def _show_counts(self, counts: EngineCounts) -> None:
        metrics = self._metrics
        metrics.router_sampled_steps.inc(counts.steps)
        for adapter_id, routers in counts.routers.items():
            label = self._label(adapter_id)
            for router, count in routers.items():
                module = router.rpartition(".")[2]
                metrics.router_tokens.labels(label, module).inc(count.tokens)
                metrics.router_entropy.labels(label, module).inc(count.entropy)
                for head, weight in enumerate(count.weights):
                    metrics.router_weight.labels(label, module, str(head)).inc(weight)
            share = self._collapse.add(adapter_id, routers)
            if share is not None and label != OTHER:
                metrics.router_collapsed.labels(label).set(share)
        self._collapse.keep(self._names)
        metrics.slot_hits.inc(counts.slots.hits)
        metrics.slot_misses.inc(counts.slots.misses)
        self._count_places(metrics.loads, counts.slots.loads, "slot")
        self._count_places(metrics.evictions, counts.slots.evictions, "slot")

    def _count_places(self, counter: Counter, numbers: Mapping[int, int], place: str) -> None:
        for adapter_id, number in numbers.items():
            counter.labels(self._label(adapter_id), place).inc(number)

    def _show_loads(self) -> None:
        if self.runtime is None:
            return
        loads, self.runtime.loads = self.runtime.loads, []
        unloads, self.runtime.unloads = self.runtime.unloads, []
        for adapter_id, seconds in loads:
            label = self._label(adapter_id)
            self._metrics.loads.labels(label, "host").inc()
            self._metrics.load_seconds.labels(label).observe(seconds)
        for adapter_id in unloads:
            self._metrics.evictions.labels(self._label(adapter_id), "host").inc()

    def _show_residency(self, residency: Residency) -> None:
        metrics = self._metrics
        metrics.slots_used.set(sum(adapter_id is not None for adapter_id in residency.slots))
        metrics.host_cache_adapters.set(len(residency.host))
        metrics.host_cache_bytes.set(sum(residency.host.values()))
        nbytes: dict[str, int] = {}
        for adapter_id, number in residency.host.items():
            label = self._label(adapter_id)
            nbytes[label] = nbytes.get(label, 0) + number
        _set_all(metrics.adapter_bytes, {(label,): number for label, number in nbytes.items()})
        states: dict[tuple[str, ...], float] = {}
        assert self.service is not None
        for name, served in self.service.current.items():
            label = self._labels.find(name)
            if label != OTHER:
                state = _state(served.adapter_id, residency)
                states |= {(label, other): float(other == state) for other in STATES}
        _set_all(metrics.adapter_state, states)

    def show_requests(self) -> None:
        """What this process has under way; in a front nothing else is its to show."""
        running: dict[tuple[str, ...], float] = {}
        waiting: dict[tuple[str, ...], float] = {}
        for adapter, (runs, waits) in self._engine.requests().items():
            key = (self._labels.find(None if adapter is None else name_of(adapter)),)
            running[key] = running.get(key, 0) + runs
            waiting[key] = waiting.get(key, 0) + waits
        for name, served in self.service.current.items() if self.service is not None else ():
            key = (self._labels.find(name),)
            waiting[key] = waiting.get(key, 0) + served.waiting
        _set_all(self._metrics.running, running)
        _set_all(self._metrics.waiting, waiting)

    def _retire(self, label: str) -> None:
        for metric in self._metrics.per_adapter():
            metric.remove_by_labels({"adapter": label})


def _state(adapter_id: int, residency: Residency) -> str:
    if adapter_id in residency.slots:
        return "slot"
    return "host" if adapter_id in residency.host else "disk"


def _set_all(gauge: Any, values: Mapping[tuple[str, ...], float]) -> None:
    """Set these, and to 0 all others that were ever set."""
    for labels in _known(gauge) - set(values):
        gauge.labels(*labels).set(0)
    for labels, value in values.items():
        gauge.labels(*labels).set(value)


def _known(gauge: Any) -> set[tuple[str, ...]]:
    names: Iterable[str] = gauge._labelnames
    return {tuple(sample.labels[name] for name in names) for sample in gauge.collect()[0].samples}


async def show_every_second(metrics: ServerMetrics) -> None:
    """For API server processes that nobody's scrape asks: what they have under way, in the files that are merged."""
    while True:
        metrics.show_requests()
        await asyncio.sleep(MIN_INTERVAL_S)
