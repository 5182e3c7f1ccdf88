"""Requests on their way into the engine: wait for a turn, then for the adapter to be in host memory."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

from hydraserve.server.lifecycle.served import ServedAdapter, current_scope, discreet, may_see

if TYPE_CHECKING:
    from hydraserve.server.lifecycle.service import AdapterService


class Admission:
    """`RequestHooks` of the engine."""

    def __init__(self, service: AdapterService) -> None:
        self._service = service

    async def ready(self, model: str) -> None:
        """Have the adapter read, if this is the name of one that was not, so that its name can be looked up."""
        if may_see(model):
            scope = current_scope.get()
            with discreet(model), scope.waiting() if scope is not None else nullcontext():
                await self._service.ready(model)

    def admit(self, adapter_id: int, adapter: str, request_id: str) -> AbstractAsyncContextManager[None]:
        return self._admit(adapter, request_id)

    @asynccontextmanager
    async def _admit(self, label: str, request_id: str) -> AsyncIterator[None]:
        served = self._service.contents.labelled(label)
        with served.run(request_id):
            async with AsyncExitStack() as inside:
                with discreet(served.name):
                    await self._enter(served, inside)
                yield

    async def _enter(self, served: ServedAdapter, inside: AsyncExitStack) -> None:
        service, digest = self._service, served.stored.digest
        async with served.wait():
            await service.turnstile.enter(digest, on_wait=service.prefetch_next)
            inside.callback(self._leave, digest)
            await inside.enter_async_context(service.cache.hold(served.stored))

    def _leave(self, digest: str) -> None:
        self._service.turnstile.leave(digest)
        self._service.prefetch_next()

    def cache_salt(self) -> str | None:
        return cache_salt()


def cache_salt() -> str | None:
    """What keeps the prefix cache of the current request's sender apart, see `RequestHooks`."""
    scope = current_scope.get()
    if scope is None or not scope.principal.isolated:
        return None
    return hashlib.sha256(scope.principal.name.encode()).hexdigest()
