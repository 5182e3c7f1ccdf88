"""How a server ends: after a signal when its requests are answered, after a second one at once, and with an error
when its engine has died."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Of this process, which runs one engine: set when the engine ended by itself.
_engine_died = threading.Event()


def engine_died() -> bool:
    """Whether the engine of this process ended without being asked to."""
    return _engine_died.is_set()


class Ending:
    """Of one AsyncLLM, as `hydra_ending`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: Callable[[float], object] | None = None

    def attach(self, drain: Callable[[float], object]) -> None:
        """Have `drain(seconds)` called after a signal, in a thread, before the engine is shut down. It returns when
        no request runs any more, or the seconds have passed. To be called in the server's event loop."""
        self._drain, self._loop = drain, asyncio.get_running_loop()

    def prepare(self, timeout_s: float | None) -> float | None:
        """What happens before the engine is shut down; the seconds that are left for that."""
        if self._loop is None or self._drain is None:
            return timeout_s
        if _in_loop(self._loop):  # no signal: the server gave up, or everything has ended before
            if self._engine.engine_core.resources.engine_dead:
                _engine_died.set()
            return timeout_s
        drain, self._drain = self._drain, None
        self._loop.call_soon_threadsafe(_end_at_once_on_signal, self._loop)
        started = time.monotonic()
        drain(timeout_s or 0.0)
        return None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - started))


def shutdown(original: Callable[..., None], engine: Any, timeout: float | None = None) -> None:
    """`original` (AsyncLLM.shutdown) once the server's requests are answered."""
    original(engine, timeout=engine.hydra_ending.prepare(timeout))


def _in_loop(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _end_at_once_on_signal(loop: asyncio.AbstractEventLoop) -> None:
    for number in _SIGNALS:
        loop.add_signal_handler(number, _end_at_once, number)


def _end_at_once(number: signal.Signals) -> None:
    """End this process and its engine's without waiting for anything. Engine workers end with the engine."""
    print("hydraserve: ending at once after a second signal", file=sys.stderr, flush=True)
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(128 + number)
