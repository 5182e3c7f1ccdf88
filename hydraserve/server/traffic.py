"""How many requests are under way, how many more are taken, and none while the server ends."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydraserve.errors import BusyError

# Answers that the pace is measured on, and the seconds that a client is told to wait at least and at most.
_PACE_ANSWERS = 64
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 1, 60


class Traffic:
    """Counts requests from when they have come whole until they are answered.

    `request` and `refuse` are for the event loop's thread, `drain` for any other.

    limit: requests that may be under way at once.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.running, self.draining = limit, 0, False
        self._clock = clock
        self._answered: deque[float] = deque(maxlen=_PACE_ANSWERS)
        self._lock = threading.Lock()
        self._idle = threading.Event()
        self._idle.set()

    def refuse(self) -> None:
        """Raises BusyError when another request would not be taken now."""
        if self.draining:
            raise BusyError("server", got="it is ending", expected="one that takes requests", fix="try again elsewhere")
        if self.running >= self.limit:
            error = BusyError(
                what="queue",
                got=f"{self.running} requests under way",
                expected=f"fewer than {self.limit}",
                fix="try again later or elsewhere, or start the server with more --max-queued-requests",
            )
            error.retry_after = self._wait_s()
            raise error

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request. Raises BusyError."""
        with self._lock:
            self.refuse()
            self.running += 1
            self._idle.clear()
        try:
            yield
        finally:
            self._answered.append(self._clock())
            with self._lock:
                self.running -= 1
                if self.running == 0:
                    self._idle.set()

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait until those under way are answered; whether that was within the limit."""
        with self._lock:
            self.draining = True
        return self._idle.wait(timeout_s)

    def _wait_s(self) -> int:
        """How long the requests under way take, at the pace of the latest answers."""
        if len(self._answered) < 2:
            return _SHORTEST_WAIT_S
        seconds = (self._clock() - self._answered[0]) / (len(self._answered) - 1)
        return min(_LONGEST_WAIT_S, max(_SHORTEST_WAIT_S, math.ceil(seconds * self.running)))
