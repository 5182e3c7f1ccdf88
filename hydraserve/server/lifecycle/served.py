"""What requests are served with: one name and one content, and who uses it at the moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from hydraserve.adapters.store import StoredAdapter
from hydraserve.errors import UnknownAdapterError
from hydraserve.server.keys import ANONYMOUS, Principal

# Digits of the digest in `ServedAdapter.label`, which logs and metrics show.
_SHORT_DIGEST = 12


@dataclass(eq=False)
class ServedAdapter:
    """One content under one name. A name that is given new content gets another of these; this one ends when the
    requests that use it have ended.

    label:   unique for name and content; what the engine calls the adapter.
    request: vLLM's LoRARequest.
    removed: taken away by force: requests that have not begun are refused.
    waiting: of its requests, those that are not in the engine yet.
    """

    name: str
    stored: StoredAdapter
    adapter_id: int
    request: Any
    removed: bool = False
    waiting: int = 0
    served: int = 0
    last_used: float | None = None
    _running: dict[object, str] = field(default_factory=dict)
    _holds: int = 0
    _watchers: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return label_of(self.name, self.stored.digest)

    @property
    def version(self) -> str:
        """As in the header x-hydraserve-adapter."""
        return f"{self.name}@{self.stored.digest}"

    @property
    def request_ids(self) -> list[str]:
        """Of the requests that are running or waiting for their turn."""
        return list(self._running.values())

    @property
    def in_use(self) -> bool:
        return bool(self._running) or self._holds > 0

    @contextmanager
    def run(self, request_id: str) -> Iterator[None]:
        """Count a request in. Raises UnknownAdapterError when the adapter was taken away by force."""
        self.refuse_if_removed()
        token = object()
        self._running[token] = request_id
        self.last_used = time.time()
        try:
            yield
            self.served += 1
        finally:
            del self._running[token]
            self.last_used = time.time()
            self.notify()

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Count a request as not in the engine yet."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def refuse_if_removed(self) -> None:
        """Raises UnknownAdapterError when the adapter was taken away by force."""
        if self.removed:
            raise UnknownAdapterError(what="adapter", got=repr(self.name), expected="a name that is still served")

    def hold(self) -> None:
        """Keep the adapter between its name being looked up and its request being counted in."""
        self._holds += 1

    def release(self) -> None:
        """Undo `hold`."""
        self._holds -= 1
        self.notify()

    @contextmanager
    def held(self) -> Iterator[None]:
        """`hold` for as long as the context lasts."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def notify(self) -> None:
        """Wake those who wait for a change."""
        for watcher in self._watchers:
            if not watcher.done():
                watcher.set_result(None)
        self._watchers.clear()

    async def changed(self) -> None:
        """Wait until the use of this adapter has changed."""
        watcher = asyncio.get_running_loop().create_future()
        self._watchers.append(watcher)
        await watcher


def label_of(name: str, digest: str) -> str:
    """What the engine calls an adapter: names cannot hold '@'."""
    return f"{name}@{digest[:_SHORT_DIGEST]}"


def name_of(label: str) -> str:
    """The name in a label."""
    return label.rpartition("@")[0] or label


class Kept(Protocol):
    """What a request keeps from going away until it ends."""

    @property
    def version(self) -> str: ...
    def release(self) -> None: ...


@dataclass
class RequestScope:
    """What belongs to one HTTP request: who sent it, and which adapter its model name stood for.

    found:   name -> what another process said that it stands for, see `server.api_servers`.
    waited:  seconds that its adapter took to be read and loaded, before the engine knew of the request.
    counted: names whose look-up is in the metrics.
    """

    principal: Principal = ANONYMOUS
    adapter: Kept | None = None
    found: dict[str, Any] = field(default_factory=dict)
    waited: float = 0.0
    counted: set[str] = field(default_factory=set)
    _held: list[Kept] = field(default_factory=list)

    def use(self, adapter: ServedAdapter) -> None:
        """Remember the adapter, and keep it until the request ends."""
        adapter.hold()
        self._held.append(adapter)
        self.adapter = self.adapter or adapter

    def keep(self, name: str, found: Kept) -> None:
        """Remember what a name stands for, which is held already, until the request ends."""
        self.found[name] = found
        self._held.append(found)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what the request waits for before the engine knows of it."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - began

    def end(self) -> None:
        """Let go of what the request used."""
        while self._held:
            self._held.pop().release()


current_scope: ContextVar[RequestScope | None] = ContextVar("hydraserve_request_scope", default=None)


class VisibleAdapters(Mapping[str, Any]):
    """name -> vLLM's LoRARequest, of the adapters that the current request's sender may use. vLLM's handlers look
    model names up here, so that nobody sees or uses an adapter that is not theirs, whatever the route."""

    def __init__(self, current: Mapping[str, ServedAdapter]) -> None:
        self._current = current

    def __getitem__(self, name: str) -> Any:
        scope = current_scope.get()
        adapter = self._current[name]
        if scope is not None:
            if not scope.principal.may_use(name):
                raise KeyError(name)
            scope.use(adapter)
        return adapter.request

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._current and may_see(name)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self._current if may_see(name)])

    def __len__(self) -> int:
        return sum(1 for _ in self)


def may_see(name: str) -> bool:
    """Whether the sender of the current request may know of an adapter of this name."""
    scope = current_scope.get()
    return scope is None or scope.principal.may_use(name)
