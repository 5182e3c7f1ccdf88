"""The engine's adapters with a counter at each door: loads, evictions, and requests that look adapters up."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from hydraserve.adapters.runtime import AdapterRuntime, EngineSizes, RequestHooks

LookUp = Callable[[str], AbstractContextManager[None]]


class MeteredRuntime:
    """An `AdapterRuntime` whose loads into host memory, and requests' look-ups, are told of.

    loads: (adapter id, seconds), unloads: adapter id, since they were last taken.
    look_up: entered around each `RequestHooks.ready`.
    """

    def __init__(self, runtime: AdapterRuntime, look_up: LookUp) -> None:
        self._runtime, self._look_up = runtime, look_up
        self.loads: list[tuple[int, float]] = []
        self.unloads: list[int] = []

    @property
    def hooks(self) -> RequestHooks | None:
        return self._runtime.hooks

    @hooks.setter
    def hooks(self, hooks: RequestHooks | None) -> None:
        self._runtime.hooks = None if hooks is None else _MeteredHooks(hooks, self._look_up)

    async def load(self, adapter_id: int, path: str, digest: str) -> None:
        began = time.monotonic()
        await self._runtime.load(adapter_id, path, digest)
        self.loads.append((adapter_id, time.monotonic() - began))

    async def unload(self, adapter_id: int) -> None:
        await self._runtime.unload(adapter_id)
        self.unloads.append(adapter_id)

    async def sizes(self) -> EngineSizes:
        return await self._runtime.sizes()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)


class _MeteredHooks:
    """`RequestHooks` with `look_up` around what makes an adapter ready."""

    def __init__(self, hooks: RequestHooks, look_up: LookUp) -> None:
        self._hooks, self._look_up = hooks, look_up

    async def ready(self, model: str) -> None:
        with self._look_up(model):
            await self._hooks.ready(model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hooks, name)
