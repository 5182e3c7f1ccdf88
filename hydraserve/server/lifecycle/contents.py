"""What is served, by name and by content. Names share content, and the last of them takes it along."""

from __future__ import annotations

from hydraserve.adapters.registry import Registry
from hydraserve.adapters.runtime import AdapterRuntime
from hydraserve.adapters.store import StoredAdapter
from hydraserve.errors import UnknownAdapterError
from hydraserve.server.lifecycle.host_cache import HostCache
from hydraserve.server.lifecycle.reader import AdapterReader
from hydraserve.server.lifecycle.served import ServedAdapter, label_of


class Contents:
    """Begins and ends the serving of contents. For one event loop.

    current: name -> what new requests for it are served with.
    """

    def __init__(self, runtime: AdapterRuntime, registry: Registry, reader: AdapterReader, cache: HostCache) -> None:
        self.current: dict[str, ServedAdapter] = {}
        self._runtime, self._registry, self._reader, self._cache = runtime, registry, reader, cache
        self._labelled: dict[str, ServedAdapter] = {}  # also those that are on their way out
        self._stored: dict[str, StoredAdapter] = {}
        reader.in_use = self._in_use

    def labelled(self, label: str) -> ServedAdapter:
        """What the engine calls by this label. Raises UnknownAdapterError."""
        served = self._labelled.get(label)
        if served is None:
            raise UnknownAdapterError(what="adapter", got=repr(label), expected="a name that is served")
        return served

    def of(self, name: str) -> list[ServedAdapter]:
        """All that requests for this name use, also those that began before it was replaced or taken away."""
        return [served for served in self._labelled.values() if served.name == name]

    def find(self, digest: str) -> StoredAdapter | None:
        """Content that is served, or on its way out."""
        return self._stored.get(digest)

    def serve(self, name: str, stored: StoredAdapter) -> None:
        """Let new requests for the name use this content. If it is still on its way out, it stays."""
        label = label_of(name, stored.digest)
        served = self._labelled.get(label)
        if served is None:
            adapter_id = self._cache.adapter_id(stored.digest)
            request = self._runtime.request(label, adapter_id, stored.path)
            served = self._labelled[label] = ServedAdapter(name, stored, adapter_id, request)
        served.removed = False
        self._stored[stored.digest] = stored
        self.current[name] = served
        served.notify()

    def withdraw(self, name: str) -> ServedAdapter | None:
        """Let no new request use the name; what it stood for, to be retired."""
        return self.current.pop(name, None)

    async def retire(self, served: ServedAdapter) -> None:
        """Wait until nothing uses it, then free its slot, its host memory, its KV blocks and its copy on disk."""
        while served.in_use and self.current.get(served.name) is not served:
            await served.changed()
        if self.current.get(served.name) is served or self._labelled.get(served.label) is not served:
            return
        del self._labelled[served.label]
        await self._runtime.evict_blocks(served.label)
        await self.free(served.stored.digest)

    async def free(self, digest: str) -> None:
        """Let go of content, unless something needs it: another name, or a reading that has come to the same."""
        if self._in_use(digest) or self._reader.reading(digest):
            return
        self._stored.pop(digest, None)
        await self._cache.drop(digest)
        await self._reader.collect(digest)

    def _in_use(self, digest: str) -> bool:
        return self._registry.uses(digest) or any(s.stored.digest == digest for s in self._labelled.values())
