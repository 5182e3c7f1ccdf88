"""What requests are served with: one name and one content, and who uses it at the moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from hydraserve.adapters.derive import split_derived
from hydraserve.adapters.store import StoredAdapter
from hydraserve.errors import HydraServeError, UnknownAdapterError
from hydraserve.server.keys import ANONYMOUS, Principal


@dataclass(eq=False)
class ServedAdapter:
    """One content under one name. A name that is given new content gets another of these; this one ends when the
    requests that use it have ended.

    label:   unique for name and content; what the engine calls the adapter.
    request: vLLM's LoRARequest.
    removed: taken away by force: requests that have not begun are refused.
    underivable: what cannot be derived from it, and why.
    """

    name: str
    stored: StoredAdapter
    adapter_id: int
    request: Any
    removed: bool = False
    underivable: dict[str, UnknownAdapterError] = field(default_factory=dict)
    served: int = 0
    last_used: float | None = None
    _running: dict[object, str] = field(default_factory=dict)
    _waiting: set[asyncio.Timeout] = field(default_factory=set)
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
    def waiting(self) -> int:
        """How many of them are not in the engine yet."""
        return len(self._waiting)

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

    @asynccontextmanager
    async def wait(self) -> AsyncIterator[None]:
        """Count a request as not in the engine yet. Raises UnknownAdapterError, whatever is being waited for, when the
        adapter is taken away by force."""
        until_removed = asyncio.timeout(None)
        try:
            async with until_removed:
                self._waiting.add(until_removed)
                try:
                    yield
                finally:
                    self._waiting.discard(until_removed)
        except TimeoutError as error:
            if until_removed.expired():
                raise self._gone() from error
            raise
        self.refuse_if_removed()

    def take_away(self) -> None:
        """By force: requests that have not begun are refused."""
        self.removed = True
        for until_removed in self._waiting:
            until_removed.reschedule(asyncio.get_running_loop().time())

    def refuse_if_removed(self) -> None:
        """Raises UnknownAdapterError when the adapter was taken away by force."""
        if self.removed:
            raise self._gone()

    def _gone(self) -> UnknownAdapterError:
        return UnknownAdapterError(what="adapter", got=repr(self.name), expected="a name that is still served")

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
    """What the engine calls an adapter. With all of the digest: contents whose digests begin alike can be made."""
    return f"{name}@{digest}"


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

    told_all: whether its sender may know what concerns others: where adapters come from, and how they are used.
    found:    name -> what another process said that it stands for, see `server.api_servers`.
    waited:   seconds that its adapter took to be read and loaded, before the engine knew of the request.
    counted:  names whose look-up is in the metrics.
    """

    principal: Principal = ANONYMOUS
    told_all: bool = True
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


def told_all() -> bool:
    """Whether the sender of the current request may know what concerns others."""
    scope = current_scope.get()
    return scope is None or scope.told_all


@contextmanager
def discreet(name: str) -> Iterator[None]:
    """Errors about an adapter, as the sender of the current request may see them: they may say where it comes from, and
    the names of adapters that it is made of."""
    try:
        yield
    except HydraServeError as error:
        is_senders_own = isinstance(error, UnknownAdapterError) and split_derived(name) is not None
        if told_all() or is_senders_own:
            raise
        raise type(error)(
            f"adapter {name!r}",
            got="one that cannot be used at the moment",
            expected="one that can",
            fix="ask whoever runs this server, who is told the reason",
        ) from error


def may_see(name: str) -> bool:
    """Whether the sender of the current request may know of an adapter of this name."""
    scope = current_scope.get()
    return scope is None or scope.principal.may_use(name)
