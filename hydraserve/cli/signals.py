"""Signals that end a command, as exceptions: so that it stops the servers that it started."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What `kill`, a supervisor or a closed terminal sends. Python ends at once on both, without leaving any `with` block.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(SystemExit):
    """The process was asked to end. name: of the signal; status: the exit status, as shells give it.

    A SystemExit because asyncio hands on that one from wherever it comes, and swallows others in its callbacks.
    """

    def __init__(self, number: int) -> None:
        self.name, self.status = signal.Signals(number).name, 128 + number
        super().__init__(self.status)


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise Terminated, once: a second one would interrupt the stopping of the servers.

    Only signals that would end the process are taken: under `nohup`, SIGHUP stays ignored. For the main thread.
    """
    taken = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    asked = False

    def handler(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise Terminated(number)

    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
