"""Work that goes on beside the requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger("hydraserve.server")

T = TypeVar("T")


class Tasks:
    """Keeps what runs, so that it is not forgotten and can be ended. For one event loop."""

    def __init__(self) -> None:
        self.running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something that nobody has to wait for. Its failure is logged."""
        task = self._begin(work)
        task.add_done_callback(_tell_failure)
        return task

    async def to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Do what others may wait for too, also when the request that began it is given up."""
        task = self._begin(work)
        task.add_done_callback(lambda _: task.cancelled() or task.exception())  # seen, even if nobody waits any more
        return await asyncio.shield(task)

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task

    async def close(self) -> None:
        """End all of it."""
        tasks = list(self.running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _tell_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("work beside the requests failed: %s", task.exception())
