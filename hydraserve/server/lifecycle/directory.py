"""--adapter-dir: the adapters in a directory are the ones that are served.

The directory is the wish: a sub-folder (or archive) that appears is loaded under its name, one that changes is loaded
again, one that vanishes is unloaded. Servers that share a directory so serve the same names with the same content.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from watchfiles import awatch

from hydraserve.adapters.archives import archive_stem, is_archive
from hydraserve.adapters.locate import locate
from hydraserve.adapters.registry import AdapterEntry, Origin, check_name
from hydraserve.errors import AdapterError, HydraServeError, StorageError
from hydraserve.server.lifecycle.service import AdapterService

logger = logging.getLogger("hydraserve.server")

# A copy is taken for complete when nothing about it has changed for so long.
SETTLE_S = 1.0
# Network file systems do not tell of changes made elsewhere: look this often in any case.
_RESCAN_MS = 10_000
_STEP_MS = 100


@dataclass(frozen=True)
class Found:
    """One adapter in the directory. stamp: changes when any of its files does."""

    path: Path
    stamp: tuple[tuple[str, int, int, int], ...]


def look(directory: Path) -> dict[str, Found]:
    """Name -> what is there now. Names with a dot in front are no adapters: a copy may be made under such a name and
    then renamed. Folders that are not (yet) adapters are left out."""
    found: dict[str, Found] = {}
    try:
        paths = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        # A directory that cannot be read at the moment is no wish to serve nothing.
        raise AdapterError(
            f"--adapter-dir {directory}", got=error.strerror or error, expected="a folder", fix="make it readable"
        ) from error
    for path in paths:
        try:
            if path.is_dir():
                files = locate(path)
                found[path.name] = Found(path, tuple(map(_stamp, files.paths)))
            elif is_archive(path.name):
                found[archive_stem(path.name)] = Found(path, (_stamp(path),))
        except (AdapterError, OSError):
            continue
    return found


def _stamp(path: Path) -> tuple[str, int, int, int]:
    stat = path.stat()
    return path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns


class AdapterDirectory:
    """Keeps a service's adapters of origin "directory" as they are in `directory`."""

    def __init__(self, service: AdapterService, directory: Path) -> None:
        self._service, self._directory = service, directory
        self._settled: dict[str, Found] = {}  # what was acted upon, also when it turned out to be faulty
        self._last: dict[str, Found] = {}
        self._complaints: dict[str, str] = {}  # name -> what was logged last: it is tried again, but told once

    def register(self) -> None:
        """Take on what is there at the start, without reading it: that happens when it is asked for."""
        self._last = look(self._directory)
        for name, found in self._last.items():
            if self._may_have(name):
                try:
                    self._service.register(name, str(found.path), Origin.DIRECTORY)
                    self._settled[name] = found
                except HydraServeError as error:
                    self._complain(name, error)

    async def watch(self) -> None:
        """Follow the directory until cancelled."""
        options: dict[str, Any] = {"step": _STEP_MS, "rust_timeout": _RESCAN_MS, "yield_on_timeout": True}
        while True:
            try:
                async for _ in awatch(self._directory, ignore_permission_denied=True, **options):
                    while not await self.follow():
                        await asyncio.sleep(SETTLE_S)
            except (OSError, HydraServeError) as error:  # it cannot be watched while it is away
                logger.error("--adapter-dir %s: %s", self._directory, error)
                await asyncio.sleep(_RESCAN_MS / 1000)

    async def follow(self) -> bool:
        """Act on what has not changed since the last call, also on what failed before for a reason that may pass;
        whether nothing is still changing."""
        try:
            now = await asyncio.to_thread(look, self._directory)
        except AdapterError as error:
            logger.error("%s", error)
            return True
        before, self._last = self._last, now
        for name in [name for name in self._settled if name not in now]:
            await self._vanished(name)
        for name, found in now.items():
            if before.get(name) == found != self._settled.get(name):
                await self._appeared(name, found)
        return all(before.get(name) == found for name, found in now.items())

    async def _vanished(self, name: str) -> None:
        entry = self._entry(name)
        try:
            if entry is not None and entry.origin is Origin.DIRECTORY:
                # Not waiting for its requests: others in the directory must not wait for them.
                await self._service.remove(name, wait=False, origin=Origin.DIRECTORY)
                logger.info("adapter %s: gone from %s", name, self._directory)
        except HydraServeError as error:
            self._complain(name, error)
            return
        del self._settled[name]
        self._complaints.pop(name, None)

    async def _appeared(self, name: str, found: Found) -> None:
        if not self._may_have(name):
            return
        try:
            if self._entry(name) is None:
                await self._service.add(name, str(found.path), origin=Origin.DIRECTORY)
            else:
                await self._service.replace(name, str(found.path), origin=Origin.DIRECTORY)
        except HydraServeError as error:
            self._complain(name, error)
            if not isinstance(error, AdapterError) or isinstance(error, StorageError):
                return  # nothing that is wrong with the files
        else:
            self._complaints.pop(name, None)
        self._settled[name] = found

    def _may_have(self, name: str) -> bool:
        """Whether the name is free for the directory, or its own."""
        entry = self._entry(name)
        if entry is not None and entry.origin is not Origin.DIRECTORY:
            self._complain(name, f"not served: the name is taken (by the {entry.origin})")
            return False
        try:
            check_name(name)
        except HydraServeError as error:
            self._complain(name, error)
            return False
        return True

    def _complain(self, name: str, about: object) -> None:
        if self._complaints.get(name) != str(about):
            self._complaints[name] = str(about)
            logger.error("adapter %s of --adapter-dir: %s", name, about)

    def _entry(self, name: str) -> AdapterEntry | None:
        return self._service.registry.find(name)
