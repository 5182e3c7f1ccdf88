"""Adapters that keep a slot."""

from __future__ import annotations

from hydraserve.adapters.registry import AdapterEntry, Registry
from hydraserve.adapters.store import StoredAdapter
from hydraserve.errors import AdapterConflictError
from hydraserve.server.lifecycle.host_cache import HostCache
from hydraserve.server.lifecycle.turnstile import Turnstile


class Pins:
    """Pinned adapters have slots of their own; the others take turns on what is left, at least one of `slots`.

    Which entries are pinned is in the entries. A pin counts from the moment that it is asked for, so that two cannot
    take the last slot together.
    """

    def __init__(self, registry: Registry, cache: HostCache, turnstile: Turnstile, slots: int) -> None:
        self._registry, self._cache, self._turnstile, self._slots = registry, cache, turnstile, slots

    def check(self, stored: StoredAdapter, besides: AdapterEntry | None = None) -> None:
        """Whether this content may have a slot of its own. besides: an entry whose pin goes over to it.

        Raises AdapterConflictError.
        """
        pinned = self._pinned(besides)
        if stored.digest not in pinned and len(pinned) + 1 >= self._slots:
            raise AdapterConflictError(
                what="pinned adapters",
                got=f"{len(pinned)} of {self._slots} slots taken by them",
                expected="at least one slot for the others",
                fix="unpin an adapter, or start the server with more --slots",
            )

    async def pin(self, entry: AdapterEntry) -> None:
        """Give an entry, whose content was read, a slot, once requests that run leave one.

        Raises AdapterConflictError, and what loading raises.
        """
        assert entry.version is not None
        self.check(entry.version, besides=entry)
        entry.pinned = True
        self._share()
        try:
            # Not before the others' requests leave a slot: the engine takes it from an adapter that is running.
            await self._turnstile.own_slot(entry.version.digest)
            await self._cache.pin(entry.version)
        except BaseException:
            entry.pinned = False
            self._share()
            raise

    async def unpin(self, entry: AdapterEntry) -> None:
        """Let an entry take turns again."""
        entry.pinned = False
        if entry.version is not None:
            await self._let_go(entry.version)

    async def move(self, entry: AdapterEntry, old: StoredAdapter | None) -> None:
        """A pinned entry has new content, which was checked. Raises what loading raises; it is not pinned then."""
        if old is not None:
            await self._let_go(old)
        await self.pin(entry)

    async def _let_go(self, stored: StoredAdapter) -> None:
        if stored.digest not in self._pinned():
            await self._cache.unpin(stored.digest)
        self._share()

    def _pinned(self, besides: AdapterEntry | None = None) -> set[str]:
        entries = [entry for entry in self._registry if entry.pinned and entry is not besides]
        return {entry.version.digest for entry in entries if entry.version is not None}

    def _share(self) -> None:
        pinned = self._pinned()
        self._turnstile.set_slots(self._slots - len(pinned), pinned)
