"""Counts requests: in the engine, and before that, while their adapter is read and loaded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from hydraserve.adapters.observation import RequestEnd
from hydraserve.adapters.runtime import Residency
from hydraserve.metrics import Metrics
from hydraserve.server.lifecycle.served import ServedAdapter, current_scope, may_see, name_of
from hydraserve.server.metrics.labels import AdapterLabels


class Service(Protocol):
    """What is needed of `AdapterService`."""

    @property
    def current(self) -> Mapping[str, ServedAdapter]: ...
    @property
    def registry(self) -> Any: ...
    @property
    def cache(self) -> Any: ...
    async def residency(self) -> Residency: ...


@dataclass(frozen=True)
class _Begun:
    """waited: seconds from the request's arrival until the engine was told of it."""

    adapter: str | None
    label: str
    waited: float


class RequestMetrics:
    """`RequestObserver` of the engine: counts requests as they end."""

    def __init__(self, metrics: Metrics, labels: AdapterLabels) -> None:
        self._metrics, self._labels = metrics, labels

    def begin(self, adapter: str | None) -> _Begun:
        scope = current_scope.get()
        return self._begin(None if adapter is None else name_of(adapter), scope.waited if scope is not None else 0.0)

    def end(self, begun: _Begun, end: RequestEnd) -> None:
        metrics, label = self._metrics, begun.label
        metrics.requests.labels(label, end.outcome).inc()
        metrics.prompt_tokens.labels(label).inc(end.prompt_tokens)
        metrics.generated_tokens.labels(label).inc(end.generated_tokens)
        metrics.request_seconds.labels(label).observe(begun.waited + end.seconds)
        if end.first_token is not None:
            metrics.first_token_seconds.labels(label).observe(begun.waited + end.first_token)
        if end.per_token is not None:
            metrics.token_seconds.labels(label).observe(end.per_token)
        self._labels.leave(begun.adapter, label)

    def expect(self, name: str) -> None:
        """A request for this adapter comes: let it have a label from now on, as far as there are places."""
        self._labels.offer(name)

    def lost(self, name: str, outcome: str, seconds: float) -> None:
        """Count a request that ended before the engine was told of it."""
        self.end(self._begin(name, seconds), RequestEnd(outcome))

    def _begin(self, name: str | None, waited: float) -> _Begun:
        return _Begun(name, self._labels.enter(name), waited)


class Lookups:
    """Requests from when their adapter's name is looked up until it is ready: read, and loaded if that is quick.

    service:   None until the adapters are there.
    on_ready:  told the id and the name of each adapter that a request may use now.
    preparing: name -> requests that are there at the moment.
    """

    def __init__(
        self,
        metrics: Metrics,
        requests: RequestMetrics,
        service: Callable[[], Service | None],
        on_ready: Callable[[int, str], None],
    ) -> None:
        self._metrics, self._requests, self._service, self._on_ready = metrics, requests, service, on_ready
        self.preparing: Counter[str] = Counter()

    @contextmanager
    def look_up(self, name: str) -> Iterator[None]:
        """Around what makes the adapter of this name ready. A request that fails or is given up there ends there."""
        service, began = self._service(), time.monotonic()
        if service is None or not may_see(name):
            yield
            return
        self._count_hit(service, name)
        counted = Counter([name] if service.registry.find(name) is not None else [])
        for known in counted:
            self._requests.expect(known)
        self.preparing += counted
        try:
            yield
        except BaseException as error:
            if service.registry.find(name) is not None:  # others are the client's mistake, and without bounds
                outcome = "error" if isinstance(error, Exception) else "abort"
                self._requests.lost(name, outcome, time.monotonic() - began)
            raise
        finally:
            self.preparing -= counted
        if (served := service.current.get(name)) is not None:
            self._on_ready(served.adapter_id, name)

    def _count_hit(self, service: Service, name: str) -> None:
        """Whether the adapter is in host memory; once, however often one HTTP request looks it up."""
        served, scope = service.current.get(name), current_scope.get()
        if served is None or (scope is not None and name in scope.counted):
            return
        if scope is not None:
            scope.counted.add(name)
        hit = service.cache.ready(served.stored.digest)
        (self._metrics.host_cache_hits if hit else self._metrics.host_cache_misses).inc()
