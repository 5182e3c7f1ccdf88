"""Who may use the slots, and for how long, when more adapters are asked for than there are slots."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

# Long enough that a turn is worth the copy of an adapter into its slot, short beside what a user waits for an answer.
TURN_S = 1.0


@dataclass
class _Turn:
    """An adapter that has a slot: since when, and for how many requests."""

    started: float
    running: int = 0


class Turnstile:
    """Lets requests of at most `slots` different adapters into the engine at once, in turns.

    Left alone, vLLM's scheduler lets requests pass whose adapter is in the batch already, and another adapter's wait
    for as long as such requests keep coming. Here an adapter's turn ends after `turn_s` seconds as soon as another
    adapter waits: its next requests queue up behind, its running ones end, and the slot goes to whoever has waited
    longest. So with A adapters on S slots no request waits for more than about A / S turns, each of `turn_s` and the
    longest request that was running at its end.

    Adapters that keep a slot of their own (see `set_slots`) pass at once and do not count, from when they have it.
    """

    def __init__(self, slots: int, turn_s: float = TURN_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots, self._turn_s, self._clock = slots, turn_s, clock
        self._turns: dict[str, _Turn] = {}
        # In the order in which the adapters' oldest waiting requests came.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._exempt: frozenset[str] = frozenset()
        self._owners: frozenset[str] = frozenset()  # those of them that have got their slot
        self._coming: list[asyncio.Future[None]] = []  # who waits for more of them

    @property
    def active(self) -> int:
        """Adapters that have requests in the engine."""
        return len(self._turns)

    def waiting(self, adapter: str) -> int:
        """Requests that wait for this adapter's turn."""
        return len(self._waiting.get(adapter, ()))

    def running(self, adapter: str) -> int:
        """Requests that this adapter has in the engine."""
        turn = self._turns.get(adapter)
        return 0 if turn is None else turn.running

    async def enter(self, adapter: str, on_wait: Callable[[], None] | None = None) -> None:
        """Wait for the adapter's turn. Each return of this must be followed by one `leave`.

        on_wait: called when the turn does not come at once.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(adapter, deque()).append(future)
        self.advance()
        if on_wait is not None and not future.done():
            on_wait()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # let in and cancelled at the same time
                self.leave(adapter)
            else:
                self._forget(adapter, future)
            raise

    def next(self, count: int) -> list[str]:
        """The adapters, at most `count`, that have no slot and whose turn comes next."""
        return [adapter for adapter in self._waiting if adapter not in self._turns][:count]

    def leave(self, adapter: str) -> None:
        """A request of the adapter has ended."""
        turn = self._turns[adapter]
        turn.running -= 1
        if turn.running == 0:
            del self._turns[adapter]
        self.advance()

    def advance(self) -> None:
        """Let in whoever may be. Called whenever something has changed."""
        now = self._clock()
        # While more adapters have turns than there are slots for, turns have to end as well.
        someone_waits = self._taken() > self._slots
        if not someone_waits:
            self._hand_over()
        for adapter in list(self._waiting):
            turn = self._turns.get(adapter)
            if adapter in self._owners or (adapter in self._exempt and turn is not None):
                self._let_in(adapter, now)
            elif adapter in self._exempt:
                continue  # its slot is still in use; no turn of another one has to end for it besides
            elif turn is not None:
                if not someone_waits or now - turn.started < self._turn_s:
                    self._let_in(adapter, now)
            elif self._taken() < self._slots:
                self._let_in(adapter, now)
            else:
                someone_waits = True

    def _taken(self) -> int:
        return sum(adapter not in self._exempt for adapter in self._turns)

    def set_slots(self, slots: int, exempt: Collection[str] = ()) -> None:
        """How many adapters may be in the engine at once, besides those that have a slot of their own.

        Such a slot may still be in use by others: it is the adapter's once no more than `slots` others have turns.
        """
        self._slots, self._exempt = slots, frozenset(exempt)
        self._owners &= self._exempt
        self._wake()
        self.advance()

    async def own_slot(self, adapter: str) -> None:
        """Wait until an adapter has the slot of its own that it was given, or is not to have one any more."""
        while adapter in self._exempt - self._owners:
            coming = asyncio.get_running_loop().create_future()
            self._coming.append(coming)
            await coming

    def _hand_over(self) -> None:
        if self._owners != self._exempt:
            self._owners = self._exempt
            self._wake()

    def _wake(self) -> None:
        for coming in self._coming:
            if not coming.done():
                coming.set_result(None)
        self._coming.clear()

    @property
    def has_place(self) -> bool:
        """Whether another adapter's turn could begin at once."""
        return self._taken() < self._slots

    def _let_in(self, adapter: str, now: float) -> None:
        turn = self._turns.setdefault(adapter, _Turn(now))
        for future in self._waiting.pop(adapter):
            if not future.done():
                turn.running += 1
                future.set_result(None)
        if turn.running == 0:  # all of them had given up
            del self._turns[adapter]

    def _forget(self, adapter: str, future: asyncio.Future[None]) -> None:
        queue = self._waiting.get(adapter)
        if queue is not None and future in queue:
            queue.remove(future)
            if not queue:
                del self._waiting[adapter]
                self.advance()
