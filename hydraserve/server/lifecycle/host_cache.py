"""Which adapters are in the engine's host memory: loaded when needed, the least recently used one evicted."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hydraserve.adapters.runtime import AdapterRuntime
from hydraserve.adapters.store import StoredAdapter


@dataclass(eq=False)
class _Copy:
    """One adapter's place in host memory. loading: ends when the adapter is there, or with the error why not."""

    adapter_id: int
    loading: asyncio.Task[None]
    users: int = 0
    pinned: bool = False

    @property
    def ready(self) -> bool:
        return self.loading.done() and not self.loading.cancelled() and self.loading.exception() is None

    @property
    def evictable(self) -> bool:
        return self.ready and self.users == 0 and not self.pinned


@dataclass
class HostCache:
    """At most `capacity` adapters, by digest. An adapter in use or pinned is never evicted.

    Not thread-safe: for one event loop.
    """

    runtime: AdapterRuntime
    capacity: int
    _copies: OrderedDict[str, _Copy] = field(default_factory=OrderedDict)  # least recently used first
    _leaving: dict[str, asyncio.Task[None]] = field(default_factory=dict)  # on their way out of the engine
    _emptying: int = 0  # places of dropped adapters that are not free yet
    _ids: dict[str, int] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def adapter_id(self, digest: str) -> int:
        """The engine's id of this content: the same one until it is dropped."""
        if digest not in self._ids:
            self._ids[digest] = self.runtime.new_id()
        return self._ids[digest]

    def ready(self, digest: str) -> bool:
        """Whether the adapter is in host memory."""
        copy = self._copies.get(digest)
        return copy is not None and copy.ready

    def loading(self, digest: str) -> bool:
        """Whether the adapter is on its way into host memory."""
        copy = self._copies.get(digest)
        return copy is not None and not copy.loading.done()

    @asynccontextmanager
    async def hold(self, stored: StoredAdapter) -> AsyncIterator[int]:
        """Have the adapter in host memory, waiting for a place and for loading; gives its id.

        Raises HydraServeError when it cannot be loaded.
        """
        copy = self._copies.get(stored.digest)
        while copy is None:
            copy = self._place(stored)
            if copy is None:
                self._changed.clear()
                await self._changed.wait()
                copy = self._copies.get(stored.digest)
        copy.users += 1
        self._copies.move_to_end(stored.digest)
        try:
            await asyncio.shield(copy.loading)
            yield copy.adapter_id
        finally:
            copy.users -= 1
            self._changed.set()

    async def prefetch(self, stored: StoredAdapter, *, evict: bool = True) -> bool:
        """Load the adapter if there is a place for it now; whether it is in host memory in the end.

        evict: whether another one, that is not in use, may make room.

        Raises HydraServeError when it cannot be loaded.
        """
        copy = self._copies.get(stored.digest)
        if copy is None and (evict or self._has_place):
            copy = self._place(stored)
        if copy is None:
            return False
        self._copies.move_to_end(stored.digest)
        await asyncio.shield(copy.loading)
        return True

    async def pin(self, stored: StoredAdapter) -> None:
        """Keep the adapter in host memory and in a slot, loading it first.

        Raises HydraServeError when it cannot be loaded or too many are pinned.
        """
        async with self.hold(stored) as adapter_id:
            await self.runtime.pin(adapter_id, True)
            self._copies[stored.digest].pinned = True

    async def unpin(self, digest: str) -> None:
        """Undo `pin`; nothing happens when it is not pinned."""
        copy = self._copies.get(digest)
        if copy is not None and copy.pinned:
            copy.pinned = False
            await self.runtime.pin(copy.adapter_id, False)
            self._changed.set()

    async def drop(self, digest: str) -> None:
        """Free everything the engine holds of an adapter that is no longer served. It must not be in use."""
        copy = self._copies.pop(digest, None)
        self._ids.pop(digest, None)
        if copy is not None:
            self._emptying += 1
            self._leave(digest, copy).add_done_callback(lambda _: self._emptied())
        if digest in self._leaving:
            await asyncio.shield(self._leaving[digest])

    def _emptied(self) -> None:
        self._emptying -= 1
        self._changed.set()

    @property
    def _has_place(self) -> bool:
        return len(self._copies) + self._emptying < self.capacity

    def _place(self, stored: StoredAdapter) -> _Copy | None:
        """A place for an adapter that has none, with its loading begun; None when all are in use."""
        # What was evicted a moment ago comes back under the same id: not before it has gone.
        first = [self._leaving[stored.digest]] if stored.digest in self._leaving else []
        if not self._has_place:
            victim = next((digest for digest, copy in self._copies.items() if copy.evictable), None)
            if victim is None:
                return None
            first.append(self._leave(victim, self._copies.pop(victim)))
        adapter_id = self.adapter_id(stored.digest)
        copy = _Copy(adapter_id, asyncio.create_task(self._load(stored, adapter_id, first)))
        self._copies[stored.digest] = copy
        copy.loading.add_done_callback(lambda _: self._loaded(stored.digest, copy))
        return copy

    def _leave(self, digest: str, copy: _Copy) -> asyncio.Task[None]:
        async def leave() -> None:
            await asyncio.wait([copy.loading])
            await self.runtime.unload(copy.adapter_id)

        leaving = self._leaving[digest] = asyncio.create_task(leave())
        leaving.add_done_callback(lambda _: self._left(digest, leaving))
        return leaving

    def _left(self, digest: str, leaving: asyncio.Task[None]) -> None:
        if self._leaving.get(digest) is leaving:
            del self._leaving[digest]

    async def _load(self, stored: StoredAdapter, adapter_id: int, first: list[asyncio.Task[None]]) -> None:
        for unloading in first:
            await unloading
        await self.runtime.load(adapter_id, stored.path, stored.digest)

    def _loaded(self, digest: str, copy: _Copy) -> None:
        if not copy.ready and self._copies.get(digest) is copy:
            del self._copies[digest]
        self._changed.set()
