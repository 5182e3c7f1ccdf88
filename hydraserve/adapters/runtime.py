"""What the server asks of the engine, and the engine of the server. Neither imports the other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from hydra_kernels import SlotCapacity


@dataclass(frozen=True)
class EngineSizes:
    """How the engine was started.

    slots:         adapters that can be in one batch.
    host_adapters: adapters kept in host memory, at least the slots.
    capacity:      the largest adapter that a slot takes.
    targets:       last components of the paths of the wrapped modules.
    dtype:         of the adapters.
    trace_bytes:   memory that tracing a request's routing takes for each token, in the worker that records most.
    """

    slots: int
    host_adapters: int
    capacity: SlotCapacity
    targets: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    trace_bytes: int = 0


@dataclass(frozen=True)
class Residency:
    """What the engine holds at one moment.

    host:          adapter id -> bytes in host memory, of the worker that holds most.
    slots:         adapter id in each slot, or None; of all data-parallel engines, one after the other.
    blocks:        KV blocks in all, free, and with a prefix that a request could hit.
    process_bytes: resident memory of the engine's largest process.
    """

    host: dict[int, int]
    slots: tuple[int | None, ...]
    blocks: int
    free_blocks: int
    cached_blocks: int
    process_bytes: int


class RequestHooks(Protocol):
    """What the server wants to do around a request on its way into the engine. Set as `AdapterRuntime.hooks`."""

    async def ready(self, model: str) -> None:
        """Called before the model's name is looked up; may wait, and raise HydraServeError instead of an answer."""

    def admit(self, adapter_id: int, adapter: str, request_id: str) -> AbstractAsyncContextManager[None]:
        """Entered before a request goes to the engine, left when it has ended. The adapter must be in host memory
        all that time. `adapter` is the name that `AdapterRuntime.request` was given."""

    def cache_salt(self) -> str | None:
        """What keeps the current request's prefix cache apart from others', in hexadecimal, or None."""


class AdapterRuntime(Protocol):
    """The engine, as far as adapters are concerned. Errors are HydraServeError's subclasses."""

    hooks: RequestHooks | None

    async def sizes(self) -> EngineSizes: ...

    def new_id(self) -> int:
        """An adapter id that no adapter has had."""

    def request(self, adapter: str, adapter_id: int, path: str) -> Any:
        """What vLLM hands around with a request: `adapter` (unique for name and content) and `path` are part of
        the key of its prefix cache."""

    def publish(self, models: Any, requests: Any, name_of: Callable[[str], str]) -> None:
        """Let vLLM's handlers look adapters up in `requests` (name -> `request(...)`), and say `name_of(adapter)`
        where they tell a client its name. `models`: vLLM's OpenAIServingModels."""

    async def load(self, adapter_id: int, path: str, digest: str) -> None:
        """Read a stored adapter into host memory, beside the running steps. Returns when it is there."""

    async def unload(self, adapter_id: int) -> None:
        """Free the adapter's slot and its host memory."""

    async def pin(self, adapter_id: int, pinned: bool) -> None:
        """Put an adapter that is in host memory into a slot and keep it there, or let it go again."""

    async def evict_blocks(self, adapter: str) -> int:
        """Forget the KV blocks that were computed with `adapter`; returns how many."""

    async def residency(self) -> Residency: ...

    def abort(self, request_ids: Iterable[str]) -> Awaitable[None]:
        """End running requests; their clients get what was generated so far."""
