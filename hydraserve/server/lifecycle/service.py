"""The life of an adapter: registered, read, served, replaced, pinned, removed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from weakref import WeakKeyDictionary, WeakValueDictionary

from hydraserve.adapters.derive import check_spec, split_derived
from hydraserve.adapters.registry import AdapterEntry, Origin, Registry, check_name
from hydraserve.adapters.runtime import AdapterRuntime, Residency
from hydraserve.adapters.sources import Progress, without_secrets
from hydraserve.adapters.store import StoredAdapter
from hydraserve.errors import AdapterConflictError, HydraServeError, UnknownAdapterError
from hydraserve.server.lifecycle.contents import Contents
from hydraserve.server.lifecycle.host_cache import HostCache
from hydraserve.server.lifecycle.origins import Origins
from hydraserve.server.lifecycle.pins import Pins
from hydraserve.server.lifecycle.reader import AdapterReader, Read
from hydraserve.server.lifecycle.refusals import refuse_directorys, refuse_other_content, refuse_other_source, unknown
from hydraserve.server.lifecycle.served import ServedAdapter
from hydraserve.server.lifecycle.tasks import Tasks
from hydraserve.server.lifecycle.turnstile import Turnstile

logger = logging.getLogger("hydraserve.server")

# Requests for an adapter that could not be read get the same error for so long, without another attempt.
_RETRY_S = 5.0


class AdapterService:
    """What the HTTP routes and the directory watcher call. For one event loop.

    current: name -> what new requests for it are served with. Held by vLLM's handlers too (`VisibleAdapters`).
    taken:   names of the base model, which no adapter may have.
    """

    def __init__(
        self,
        runtime: AdapterRuntime,
        registry: Registry,
        reader: AdapterReader,
        cache: HostCache,
        slots: int,
        taken: Collection[str] = (),
    ) -> None:
        self.runtime, self.registry, self.cache = runtime, registry, cache
        self.turnstile = Turnstile(slots)
        self.contents = Contents(runtime, registry, reader, cache)
        self.current = self.contents.current
        self.progress: dict[str, Progress] = {}
        self.tasks = Tasks()
        self.abort_elsewhere: Callable[[list[str]], None] = lambda _: None  # requests of other API server processes
        self._slots, self._taken = slots, frozenset(taken)
        self._pins = Pins(registry, cache, self.turnstile, slots)
        self._origins = Origins(registry, reader, self.contents)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._retiring: WeakKeyDictionary[ServedAdapter, asyncio.Task[None]] = WeakKeyDictionary()

    async def restore(self) -> None:
        """Serve what the registry remembers of an earlier run, without reading it."""
        for entry in self.registry:
            if entry.version is not None:
                self.contents.serve(entry.name, entry.version)
        pinned = [entry for entry in self.registry if entry.pinned]
        for entry in pinned:
            entry.pinned = False
        for entry in pinned:
            try:
                await self._set_pinned(entry, True)
            except HydraServeError as error:
                logger.error("adapter %s is not pinned any more: %s", entry.name, error)

    async def add(
        self,
        name: str,
        source: str,
        *,
        pin: bool = False,
        digest: str | None = None,
        origin: Origin = Origin.API,
    ) -> tuple[AdapterEntry, bool]:
        """Register, read and serve an adapter; (entry, whether it is new). Adding the same again changes nothing.

        Raises AdapterConflictError when the name stands for another source; what reading raises. Nothing is left
        behind then.
        """
        check_name(name)
        self._refuse_taken(name)
        await self._read_parts(source)
        async with self._lock(name):
            entry = self.registry.find(name)
            if entry is not None:
                refuse_other_source(entry, source)
                if digest is not None and entry.version is None:
                    await self._read(entry, source, digest)
                elif entry.version is not None:
                    refuse_other_content(entry.version, digest, source)
                if pin:
                    await self._set_pinned(entry, True)
                return entry, False
            entry = AdapterEntry(name, source, origin, given=source if origin is Origin.COMMAND_LINE else None)
            self.registry.put(entry)
            try:
                await self._read(entry, source, digest)
                if pin:
                    await self._set_pinned(entry, True)
            except BaseException:
                self._forget(entry)
                raise
            return entry, True

    async def claim(self, name: str, source: str, origin: Origin) -> None:
        """`add`, also when an earlier run left something else under the name."""
        self.registry.remove(name)
        await self.add(name, source, origin=origin)

    def register(self, name: str, source: str, origin: Origin) -> None:
        """Take an adapter on that is read when the first request asks for it. Raises as `add` for its name."""
        check_name(name)
        self._refuse_taken(name)
        if self.registry.find(name) is not None:
            raise AdapterConflictError(what="adapter", got=f"{name!r}, which is registered", expected="a new name")
        self.registry.put(AdapterEntry(name, source, origin))

    async def replace(
        self,
        name: str,
        source: str | None = None,
        *,
        pin: bool | None = None,
        digest: str | None = None,
        origin: Origin = Origin.API,
    ) -> tuple[AdapterEntry, bool]:
        """Read an adapter again, or from another source, and serve new requests with that; (entry, whether new).

        Requests that are running end with the old content. When reading fails, the old one goes on.
        """
        check_name(name)
        self._refuse_taken(name)
        known = self.registry.find(name)
        if known is None:
            if source is None:
                raise unknown(name)
            return await self.add(name, source, pin=bool(pin), digest=digest)
        await self._read_parts(source or known.source)
        async with self._lock(name):
            entry = self.registry.get(name)
            if source is not None:
                refuse_directorys(entry, origin)
            await self._read(entry, source or entry.source, digest)
            if pin is not None:
                await self._set_pinned(entry, pin)
            return entry, False

    async def remove(self, name: str, *, force: bool = False, wait: bool = True, origin: Origin = Origin.API) -> None:
        """Stop serving an adapter, or downloading it, and free all it took once its requests have ended.

        force: end them now; their clients get what was generated so far.
        wait:  return only then.

        Raises UnknownAdapterError, and AdapterConflictError for an adapter that `origin` cannot take away.
        """
        refuse_directorys(self.registry.get(name), origin)
        lock, progress = self._lock(name), self.progress.get(name)
        if progress is not None:
            progress.stopped = True
        if force and lock.locked():  # perhaps by a pin that waits for these requests to end
            await self._abort(name)
        async with lock:
            if progress is not None and self.registry.find(name) is None:
                return  # it went with its download
            entry = self.registry.get(name)
            refuse_directorys(entry, origin)
            if entry.pinned:
                await self._set_pinned(entry, False)
            self._forget(entry)
        for served in self.contents.of(name):
            if force:
                served.take_away()
            self._retire(served)
        retiring = [task for served, task in self._retiring.items() if served.name == name and not task.done()]
        if force:
            await self._abort(name)
        for derived in self._origins.derived_from(name):
            with contextlib.suppress(UnknownAdapterError):  # removed by somebody else meanwhile
                await self.remove(derived, force=force, wait=wait)
        if wait:
            await asyncio.shield(asyncio.gather(*retiring))

    async def pin(self, name: str, pinned: bool) -> AdapterEntry:
        """Keep an adapter in host memory and in a slot, or no longer. Raises AdapterConflictError."""
        async with self._lock(name):
            entry = self.registry.get(name)
            await self._set_pinned(entry, pinned)
            return entry

    async def prefetch(self, name: str) -> AdapterEntry:
        """Bring an adapter into host memory, as far as there is a place."""
        entry = self.registry.get(name)
        stored = await self._read_if_needed(entry)
        await self.cache.prefetch(stored)
        return entry

    async def ready(self, name: str) -> None:
        """Before a request looks `name` up: read the adapter if that was never done, and load it if that is quick.

        Raises what makes the adapter unusable. Does nothing for names that are no adapter's.
        """
        entry = await self._resolve(name)
        if entry is None:
            return
        stored = await self._read_if_needed(entry)
        # Otherwise the request waits for its turn first.
        if not self.cache.ready(stored.digest) and self.turnstile.has_place:
            await self.cache.prefetch(stored)

    def prefetch_next(self) -> None:
        """Begin to load the adapters whose turn comes next, where the host memory has places beyond the slots."""
        for digest in self.turnstile.next(max(0, self.cache.capacity - self._slots)):
            if not self.cache.ready(digest) and not self.cache.loading(digest):
                self.tasks.spawn(self._prefetch_quietly(digest))

    async def residency(self) -> Residency:
        """What the engine holds now."""
        return await self.runtime.residency()

    async def close(self) -> None:
        """End what runs beside the requests."""
        await self.tasks.close()

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _read_if_needed(self, entry: AdapterEntry) -> StoredAdapter:
        if entry.version is None:
            await self._read_parts(entry.source)
            await self.tasks.to_the_end(self._first_read(entry))
        if entry.version is None or self.registry.find(entry.name) is not entry:  # removed at once
            raise unknown(entry.name)
        return entry.version

    async def _first_read(self, entry: AdapterEntry) -> None:
        async with self._lock(entry.name):
            if self.registry.find(entry.name) is not entry:
                raise unknown(entry.name)
            if entry.version is None:
                if entry.failure is not None and time.monotonic() - entry.failed_at < _RETRY_S:
                    raise entry.failure.with_traceback(None)
                await self._read(entry, entry.source)

    async def _resolve(self, name: str) -> AdapterEntry | None:
        """What a name stands for. One that is derived is made when it is first asked for, and anew when what it is made
        from has new content. None when there is no such adapter, or none to derive it from."""
        if (derivation := split_derived(name)) is None:
            return self.registry.find(name)
        parent_name, spec = derivation
        while (parent := self.registry.find(parent_name)) is not None:
            content = await self._read_if_needed(parent)
            source = f"{content.digest}@{spec}"
            entry = self.registry.find(name)
            if entry is not None and entry.source == source and entry.version is not None:
                return entry
            underivable = self.current[parent_name].underivable
            if spec in underivable:
                raise underivable[spec].with_traceback(None)
            check_spec(spec, content.heads)
            try:
                return await self.tasks.to_the_end(self._make_derived(name, parent, source))
            except UnknownAdapterError as error:
                if parent.version is content:
                    underivable[spec] = error
                    raise
                # Otherwise it has new content meanwhile.
        return None

    async def _make_derived(self, name: str, parent: AdapterEntry, source: str) -> AdapterEntry | None:
        async with self._lock(name):
            if self.registry.find(parent.name) is not parent:
                return None
            entry = self.registry.find(name)
            if entry is None or entry.source != source:
                entry = entry or AdapterEntry(name, source, Origin.DERIVED)
                self.registry.put(entry)
                try:
                    await self._read(entry, source)
                except BaseException:
                    self._forget(entry)
                    raise
        return entry

    async def _read_parts(self, source: str) -> None:
        """Read what a composition is made of. Before its own name is locked: two that are made of each other would
        wait for ever."""
        for name in self._origins.parts(source):
            await self._resolve(name)
            await self._read_if_needed(self._origins.part(name))

    async def _read(self, entry: AdapterEntry, source: str, digest: str | None = None) -> None:
        """Read an entry's content, and let new requests use that. What they used before ends with its requests."""
        progress = self.progress[entry.name] = Progress()
        old, stored = self.current.get(entry.name), None
        try:
            async with self._origins.open(entry, source, progress) as read:
                stored = read.stored
                refuse_other_content(stored, digest, source)
                # A replacement is to be as quick as what it replaces; a new adapter must not push out one that is used.
                await self.cache.prefetch(stored, evict=old is not None)
                await self._install(entry, read, source)
        except HydraServeError as error:
            entry.failure, entry.failed_at = error, time.monotonic()
            raise
        finally:
            del self.progress[entry.name]
            if old is not None and old is not self.current.get(entry.name):
                self._retire(old)
            if stored is not None:
                await self.contents.free(stored.digest)

    async def _install(self, entry: AdapterEntry, read: Read, source: str) -> None:
        """Let new requests use what was read; a pin goes over to it."""
        if entry.pinned:
            self._pins.check(read.stored, besides=entry)
        old, entry.version = entry.version, read.stored
        entry.source, entry.failure = source, None
        entry.load_seconds, entry.read_at = read.seconds, time.time()
        self.registry.put(entry)
        self.contents.serve(entry.name, read.stored)
        logger.info("adapter %s: version %s from %s", entry.name, read.stored.digest, without_secrets(source))
        if entry.pinned and old != read.stored:
            await self._pins.move(entry, old)

    def _forget(self, entry: AdapterEntry) -> None:
        """Take the name away. What it stood for ends with the requests that use it."""
        self.registry.remove(entry.name)
        if (served := self.contents.withdraw(entry.name)) is not None:
            self._retire(served)

    def _retire(self, served: ServedAdapter) -> asyncio.Task[None]:
        """End what is not current any more, beside the requests; the same task for all who wait for that."""
        retiring = self._retiring.get(served)
        if retiring is None or retiring.done():
            retiring = self._retiring[served] = self.tasks.spawn(self.contents.retire(served))
        return retiring

    async def _abort(self, name: str) -> None:
        """End the requests that run with this name."""
        running = [request_id for served in self.contents.of(name) for request_id in served.request_ids]
        self.abort_elsewhere(running)
        await self.runtime.abort(running)

    async def _set_pinned(self, entry: AdapterEntry, pinned: bool) -> None:
        if pinned and not entry.pinned:
            if entry.version is None:
                await self._read(entry, entry.source)
            await self._pins.pin(entry)
        elif entry.pinned and not pinned:
            await self._pins.unpin(entry)
        self.registry.put(entry)

    async def _prefetch_quietly(self, digest: str) -> None:
        """What fails here fails again for the request that needs it, and is told there."""
        stored = self.contents.find(digest)
        if stored is None:  # gone before this began
            return
        try:
            await self.cache.prefetch(stored)
        except HydraServeError as error:
            logger.warning("%s", error)

    def _refuse_taken(self, name: str) -> None:
        if name in self._taken:
            raise AdapterConflictError(
                what="name", got=f"{name!r}, the base model's", expected="another name", fix="choose another name"
            )
