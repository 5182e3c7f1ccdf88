"""Fills the series of `hydraserve.metrics`: from requests as they end, and from the engine whenever somebody looks."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from hydraserve.adapters.observation import EngineCounts, EngineObservation
from hydraserve.adapters.runtime import AdapterRuntime, EngineSizes, Residency
from hydraserve.errors import HydraServeError
from hydraserve.metrics import Metrics
from hydraserve.server.lifecycle.served import name_of
from hydraserve.server.metrics.collapse import CollapseWindows
from hydraserve.server.metrics.labels import OTHER, AdapterLabels
from hydraserve.server.metrics.metered import MeteredRuntime
from hydraserve.server.metrics.names import AdapterNames
from hydraserve.server.metrics.requests import Lookups, RequestMetrics, Service

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
        self._names = AdapterNames(self._labels)
        self._refreshed = float("-inf")
        self._refreshing: asyncio.Task[None] | None = None
        self.runtime: MeteredRuntime | None = None
        self.service: Service | None = None
        requests = RequestMetrics(metrics, self._labels)
        engine.observer = requests
        self._lookups = Lookups(metrics, requests, lambda: self.service, self._names.note)

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
        self.runtime = MeteredRuntime(runtime, self._lookups.look_up)
        return self.runtime

    async def start(self, service: Service, sizes: EngineSizes) -> None:
        """The adapters are there. What the engine counted while it warmed up is not traffic."""
        self.service = service
        self._metrics.slots.set(len((await service.residency()).slots))
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
        current = {served.adapter_id for served in self.service.current.values()}
        alive = current | set(residency.host) | {i for i in residency.slots if i is not None}
        self._names.update(self.service.current)
        self._show_counts(counts)
        self._show_collapsed(alive)
        self._show_loads()
        self._show_residency(residency)
        self.show_requests()
        self._names.keep(alive)

    def _show_counts(self, counts: EngineCounts) -> None:
        metrics = self._metrics
        metrics.router_sampled_steps.inc(counts.steps)
        for adapter_id, routers in counts.routers.items():
            label = self._names.label(adapter_id)
            for router, count in routers.items():
                module = router.rpartition(".")[2]
                metrics.router_tokens.labels(label, module).inc(count.tokens)
                metrics.router_entropy.labels(label, module).inc(count.entropy)
                for head, weight in enumerate(count.weights):
                    metrics.router_weight.labels(label, module, str(head)).inc(weight)
            self._collapse.add(adapter_id, routers)
        metrics.slot_hits.inc(counts.slots.hits)
        metrics.slot_misses.inc(counts.slots.misses)
        self._count_places(metrics.loads, counts.slots.loads, "slot")
        self._count_places(metrics.evictions, counts.slots.evictions, "slot")

    def _show_collapsed(self, alive: Collection[int]) -> None:
        self._collapse.keep(alive)
        # Of two contents of one name, the older of which still has requests, the newer one counts.
        shares: dict[tuple[str, ...], float] = {
            (self._names.label(i),): share for i, share in sorted(self._collapse.shares().items())
        }
        shares.pop((OTHER,), None)
        _set_all(self._metrics.router_collapsed, shares)

    def _count_places(self, counter: Counter, numbers: Mapping[int, int], place: str) -> None:
        for adapter_id, number in numbers.items():
            counter.labels(self._names.label(adapter_id), place).inc(number)

    def _show_loads(self) -> None:
        if self.runtime is None:
            return
        loads, self.runtime.loads = self.runtime.loads, []
        unloads, self.runtime.unloads = self.runtime.unloads, []
        for adapter_id, seconds in loads:
            label = self._names.label(adapter_id)
            self._metrics.loads.labels(label, "host").inc()
            self._metrics.load_seconds.labels(label).observe(seconds)
        for adapter_id in unloads:
            self._metrics.evictions.labels(self._names.label(adapter_id), "host").inc()

    def _show_residency(self, residency: Residency) -> None:
        metrics = self._metrics
        metrics.slots_used.set(sum(adapter_id is not None for adapter_id in residency.slots))
        metrics.host_cache_adapters.set(len(residency.host))
        metrics.host_cache_bytes.set(sum(residency.host.values()))
        nbytes: dict[str, int] = {}
        for adapter_id, number in residency.host.items():
            label = self._names.label(adapter_id)
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
        running, waiting = Tally[tuple[str, ...]](), Tally[tuple[str, ...]]()
        for adapter, (runs, waits) in self._engine.requests().items():
            key = (self._labels.find(None if adapter is None else name_of(adapter)),)
            running[key] += runs
            waiting[key] += waits
        for name, served in self.service.current.items() if self.service is not None else ():
            waiting[self._labels.find(name),] += served.waiting
        for name, preparing in self._lookups.preparing.items():
            waiting[self._labels.find(name),] += preparing
        _set_all(self._metrics.running, running)
        _set_all(self._metrics.waiting, waiting)

    def _retire(self, label: str) -> None:
        """Another adapter has the label's place. Where several processes share the metrics, its series cannot be
        removed (prometheus_client would only forget them here, and their last values stay): gauges go to 0 with the
        next refresh, as the label has no adapter any more."""
        if self._shared:
            return
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
