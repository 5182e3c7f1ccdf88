"""Puts the parts together that keep adapters, and takes them apart again."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from hydraserve.adapters.ingest import Ingester
from hydraserve.adapters.registry import Journal, Origin, Registry
from hydraserve.adapters.requirements import Requirements
from hydraserve.adapters.runtime import AdapterRuntime
from hydraserve.adapters.scratch import ScratchFolder
from hydraserve.adapters.sources import DownloadCache, SourcePolicy
from hydraserve.adapters.store import AdapterStore
from hydraserve.config import ServerSettings, cache_dir
from hydraserve.server.lifecycle.admission import Admission
from hydraserve.server.lifecycle.directory import AdapterDirectory
from hydraserve.server.lifecycle.host_cache import HostCache
from hydraserve.server.lifecycle.reader import AdapterReader
from hydraserve.server.lifecycle.served import VisibleAdapters, name_of
from hydraserve.server.lifecycle.service import AdapterService

logger = logging.getLogger("hydraserve.server")


class AdapterServer:
    """The adapters of one server, from its start to its end. `service` is there after `start`."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._scratch = ScratchFolder(cache_dir() / "run")
        self._journal = Journal(settings.state_dir) if settings.state_dir else None
        self._ingester: Ingester | None = None
        self.service: AdapterService | None = None

    async def start(self, runtime: AdapterRuntime, models: Any) -> None:
        """Serve the adapters of the settings and of the state folder. models: vLLM's OpenAIServingModels.

        Raises HydraServeError when an adapter of the command line cannot be served.
        """
        settings = self._settings
        sizes = await runtime.sizes()
        requirements = Requirements(settings.base_shapes, sizes.capacity, sizes.targets, sizes.dtype)
        folder = settings.state_dir / "store" if settings.state_dir else self._scratch.path / "store"
        store = AdapterStore(folder)
        self._ingester = Ingester(store, requirements)
        registry = Registry(self._journal)
        if self._journal is None or self._journal.set_aside is None:  # what an unreadable journal needs is kept with it
            store.sweep({entry.version.digest for entry in registry if entry.version is not None})
        directory = [str(settings.adapter_dir)] if settings.adapter_dir else []
        policy = SourcePolicy.of([*settings.allow_sources, *directory])
        downloads = DownloadCache(cache_dir() / "downloads")
        reader = AdapterReader(store, self._ingester, policy, self._scratch.path, downloads)
        cache = HostCache(runtime, sizes.host_adapters)
        taken = [path.name for path in models.base_model_paths]
        service = AdapterService(runtime, registry, reader, cache, sizes.slots, taken)
        self.service = service
        for source in settings.adapters:
            await service.claim(source.name, str(source.path), Origin.COMMAND_LINE)
        await service.restore()
        if settings.adapter_dir is not None:
            self._follow(service, settings.adapter_dir)
        runtime.publish(models, VisibleAdapters(service.current), name_of)
        runtime.hooks = Admission(service)

    def _follow(self, service: AdapterService, folder: Path) -> None:
        directory = AdapterDirectory(service, folder)
        directory.register()
        service.tasks.spawn(directory.watch())

    async def close(self) -> None:
        """End what runs beside the requests, and remove what is not to be kept."""
        if self.service is not None:
            await self.service.close()
        if self._ingester is not None:
            await asyncio.to_thread(self._ingester.close)
        if self._journal is not None:
            self._journal.close()
        await asyncio.to_thread(self._scratch.remove)
