"""An API server process that does not keep the adapters: what it asks of the one that does."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydraserve.adapters.runtime import AdapterRuntime
from hydraserve.server.api_servers.forward import Forwarder
from hydraserve.server.api_servers.link import HTTP_SOCKET, SOCKET, Link
from hydraserve.server.keys import Principal
from hydraserve.server.lifecycle.admission import cache_salt
from hydraserve.server.lifecycle.served import current_scope, discreet, label_of, may_see, name_of


class Front:
    """`RequestHooks` of a front's engine client. folder: where the keeper's sockets are."""

    def __init__(self, folder: Path, runtime: AdapterRuntime) -> None:
        self._folder, self._runtime = folder, runtime
        self._link: Link | None = None
        self._loop = asyncio.get_running_loop()
        self._uses = itertools.count()
        self._tasks: set[asyncio.Future[None]] = set()
        self.forwarder = Forwarder(folder / HTTP_SOCKET)

    async def connect(self, timeout_s: float) -> None:
        """Find the keeper. Raises EngineError when it does not answer."""
        self._link = await Link.connect(self._folder / SOCKET, self._abort, timeout_s)

    async def count(self, principal: Principal) -> None:
        """Count one request of a key that has a limit. Raises RateLimitError."""
        await self.link.call("count", principal.name, principal.rate)

    async def ready(self, model: str) -> None:
        """Ask what the name stands for, and keep that for the request that the name is looked up for."""
        scope = current_scope.get()
        if scope is None or model in scope.found or not may_see(model):
            return
        use = next(self._uses)
        try:
            with discreet(model), scope.waiting():
                found = await self.link.call("look_up", use, model)
        except BaseException:
            self.link.tell("end", use, False)
            raise
        if found is None:
            self.link.tell("end", use, True)
            return
        digest, adapter_id, path = found
        request = self._runtime.request(label_of(model, digest), adapter_id, path)
        scope.keep(model, FoundAdapter(f"{model}@{digest}", request, lambda: self.link.tell("end", use, True)))

    def admit(self, adapter_id: int, adapter: str, request_id: str) -> AbstractAsyncContextManager[None]:
        return self._admit(adapter_id, adapter, request_id)

    @asynccontextmanager
    async def _admit(self, adapter_id: int, adapter: str, request_id: str) -> AsyncIterator[None]:
        use, is_clean = next(self._uses), False
        try:
            with discreet(name_of(adapter)):
                await self.link.call("admit", use, adapter_id, adapter, request_id)
            yield
            is_clean = True
        finally:
            self.link.tell("end", use, is_clean)

    def cache_salt(self) -> str | None:
        return cache_salt()

    def leave(self) -> None:
        """No request uses an adapter any more: tell the keeper, which may wait for that. From any thread."""
        self._loop.call_soon_threadsafe(self._leave)

    async def close(self) -> None:
        """End the connections, and what runs."""
        for task in self._tasks:
            task.cancel()
        await self.link.close()
        await self.forwarder.close()

    @property
    def link(self) -> Link:
        assert self._link is not None
        return self._link

    def _leave(self) -> None:
        self.start(self.link.close())

    def _abort(self, request_ids: list[str]) -> None:
        self.start(self._runtime.abort(request_ids))

    def start(self, work: Awaitable[None]) -> None:
        """Run something until the end."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@dataclass(frozen=True)
class FoundAdapter:
    """What a name stood for when a request asked. version: as in the header x-hydraserve-adapter."""

    version: str
    request: Any
    release: Callable[[], None]


class FoundAdapters(Mapping[str, Any]):
    """name -> vLLM's LoRARequest, of what the current request has asked for; vLLM's handlers look up names here."""

    def __getitem__(self, name: str) -> Any:
        scope = current_scope.get()
        if scope is None:
            raise KeyError(name)
        found: FoundAdapter = scope.found[name]
        scope.adapter = scope.adapter or found
        return found.request

    def __iter__(self) -> Iterator[str]:
        scope = current_scope.get()
        names: Iterable[str] = () if scope is None else list(scope.found)
        return iter(names)

    def __len__(self) -> int:
        return sum(1 for _ in self)
