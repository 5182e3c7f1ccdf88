"""From a source to a stored adapter: fetch, read, check, copy. All of it beside the event loop."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from hydraserve.adapters.compose import Recipe, router_folder
from hydraserve.adapters.files import writing
from hydraserve.adapters.ingest import Ingester
from hydraserve.adapters.sources import DownloadCache, Progress, SourcePolicy, fetch, without_secrets
from hydraserve.adapters.store import AdapterStore, StoredAdapter
from hydraserve.errors import HydraServeError


@dataclass(frozen=True)
class Read:
    """An adapter that was read, and how long that took."""

    stored: StoredAdapter
    seconds: float


class AdapterReader:
    """Brings adapters into the store, and takes them out when nothing needs them any more.

    scratch:   a folder for downloads that are under way.
    downloads: keeps those that have ended.
    in_use:    whether content of this digest is served; set by whoever serves it.
    """

    def __init__(
        self, store: AdapterStore, ingester: Ingester, policy: SourcePolicy, scratch: Path, downloads: DownloadCache
    ) -> None:
        self.policy, self._downloads = policy, downloads
        self.in_use: Callable[[str], bool] = set[str]().__contains__  # nothing is
        self._store, self._ingester, self._scratch = store, ingester, scratch
        self._lock = asyncio.Lock()  # content must not be taken out between being found there and being counted here
        self._reading: Counter[str] = Counter()

    @asynccontextmanager
    async def read(self, source: str, progress: Progress, *, trusted: bool = False) -> AsyncIterator[Read]:
        """The adapter at `source`, in the store for as long as the context lasts, and longer if it is then in use.

        trusted: a path that the operator gave when the server was started; it may be anywhere.

        Raises HydraServeError's subclasses, their `where` naming the source.
        """
        started = time.monotonic()
        stored = await self._fetch_and_read(source, progress, trusted)
        try:
            yield Read(stored, time.monotonic() - started)
        finally:
            self._reading[stored.digest] -= 1
            await self.collect(stored.digest)

    @asynccontextmanager
    async def derive(self, parent: StoredAdapter, spec: str) -> AsyncIterator[Read]:
        """What `spec` makes of an adapter in the store, kept there as by `read`. Raises as `Ingester.derive`."""
        async with self._made(lambda: self._ingester.derive(parent, spec)) as read:
            yield read

    @asynccontextmanager
    async def compose(self, recipe: Recipe, parts: Sequence[StoredAdapter]) -> AsyncIterator[Read]:
        """What `recipe` makes of adapters in the store, kept there as by `read`. Raises as `Ingester.compose` and
        `router_folder`."""
        router = None if recipe.router is None else router_folder(recipe.router, self.policy)
        async with self._made(lambda: self._ingester.compose(recipe, parts, router)) as read:
            yield read

    @asynccontextmanager
    async def _made(self, work: Callable[[], StoredAdapter]) -> AsyncIterator[Read]:
        started = time.monotonic()
        async with self._lock:
            stored = await asyncio.to_thread(work)
            self._reading[stored.digest] += 1
        try:
            yield Read(stored, time.monotonic() - started)
        finally:
            self._reading[stored.digest] -= 1
            await self.collect(stored.digest)

    def reading(self, digest: str) -> bool:
        """Whether somebody is in the context of reading this content."""
        return self._reading[digest] > 0

    async def collect(self, digest: str) -> None:
        """Take content out of the store, unless something needs it."""
        async with self._lock:
            self._reading += Counter()  # drops what has come to zero
            if not self.reading(digest) and not self.in_use(digest):
                await asyncio.to_thread(self._store.remove, digest)

    async def _fetch_and_read(self, source: str, progress: Progress, trusted: bool) -> StoredAdapter:
        with writing(self._scratch):
            scratch = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="fetch-", dir=self._scratch))
        try:
            folder = Path(source) if trusted else await asyncio.to_thread(self._fetch, source, scratch, progress)
            async with self._lock:
                stored = await asyncio.to_thread(self._ingester.read, folder)
                self._reading[stored.digest] += 1
            return stored
        except HydraServeError as error:
            # A folder of ours means nothing to whoever asked for the source.
            if error.where is None or str(scratch) in error.where:
                error.where = f"adapter {without_secrets(source)}"
            raise
        finally:
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)

    def _fetch(self, source: str, scratch: Path, progress: Progress) -> Path:
        return fetch(source, self.policy, scratch, progress, self._downloads)
