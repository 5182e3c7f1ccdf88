"""Which adapters have series of their own: the busiest, because every label value costs memory for as long as
Prometheus keeps data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

BASE, OTHER = "base", "other"
DEFAULT_SIZE = 20

# An adapter's activity is forgotten by half in this time.
HALF_LIFE_S = 600.0
# An adapter takes another one's place when it is this much busier, so that two of equal traffic do not take turns.
MUCH_BUSIER = 2.0
# Series that are given up stay visible when several processes share the metrics (prometheus_client cannot remove
# them there). So many names may then come up in all, in each process; those that came up may come back.
SHARED_NAMES_PER_PLACE = 4


@dataclass
class _Adapter:
    """activity: requests, each forgotten by half in HALF_LIFE_S; as of `seen`. users: who will use the label again."""

    activity: float = 0.0
    seen: float = 0.0
    users: int = 0


class AdapterLabels:
    """Values of the label `adapter`, at most `size` at a time, besides "base" and "other".

    retire: called with a label value whose series are to be removed.
    removable: whether `retire` can remove series.

    An adapter that is called like one of ours gets an underscore behind its name.
    """

    def __init__(
        self,
        size: int = DEFAULT_SIZE,
        retire: Callable[[str], None] = lambda _: None,
        removable: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._size, self._retire, self._clock = size, retire, clock
        self._most_names = math.inf if removable else SHARED_NAMES_PER_PLACE * size
        self._shown: set[str] = set()  # names whose series will stay, where they cannot be removed
        self._adapters: dict[str, _Adapter] = {}
        self._crowd = 2 * size  # at so many adapters, those that are hardly used are forgotten
        self._named: set[str] = set()

    def enter(self, adapter: str | None) -> str:
        """The label for a request of `adapter` (None: base model), valid until `leave`."""
        if adapter is None:
            return BASE
        now = self._clock()
        if adapter not in self._adapters:
            self._limit_crowd(now)
        known = self._adapters.setdefault(adapter, _Adapter())
        known.activity, known.seen = self._activity(known, now) + 1, now
        if adapter not in self._named and self._may_be_named(adapter):
            self._make_room(known.activity, now)
            self._name(adapter)
        if adapter not in self._named:
            return OTHER
        known.users += 1
        return _escaped(adapter)

    def leave(self, adapter: str | None, label: str) -> None:
        """The request of `adapter` that got `label` has ended."""
        if adapter is not None and label != OTHER:
            self._adapters[adapter].users -= 1

    def offer(self, adapter: str) -> None:
        """Give an adapter that nobody has used yet a label, while there are places."""
        if adapter not in self._named and len(self._named) < self._size and self._may_be_named(adapter):
            self._adapters.setdefault(adapter, _Adapter(seen=self._clock()))
            self._name(adapter)

    def find(self, adapter: str | None) -> str:
        """The label of an adapter as things are, without counting it as used."""
        if adapter is None:
            return BASE
        return _escaped(adapter) if adapter in self._named else OTHER

    def standing(self, adapter: str) -> tuple[bool, float]:
        """What to compare adapters by: whether there is a label, then how busy each was lately."""
        known = self._adapters.get(adapter, _Adapter())
        return adapter in self._named, self._activity(known, self._clock())

    def _may_be_named(self, adapter: str) -> bool:
        return adapter in self._shown or len(self._shown) < self._most_names

    def _name(self, adapter: str) -> None:
        if len(self._named) < self._size:
            self._named.add(adapter)
            if self._most_names < math.inf:
                self._shown.add(adapter)

    def _make_room(self, activity: float, now: float) -> None:
        """Give up the quietest adapter's label when `activity` is much more than its own."""
        if len(self._named) < self._size:
            return
        idle = [name for name in self._named if self._adapters[name].users == 0]
        if not idle:
            return
        quietest = min(idle, key=lambda name: self._activity(self._adapters[name], now))
        if activity > MUCH_BUSIER * self._activity(self._adapters[quietest], now):
            self._named.remove(quietest)
            self._retire(_escaped(quietest))

    def _limit_crowd(self, now: float) -> None:
        """Drop what is known of adapters that nobody has used for a long time, whenever there are twice as many."""
        if len(self._adapters) < self._crowd:
            return
        for name in [n for n, a in self._adapters.items() if n not in self._named and self._activity(a, now) < 0.01]:
            del self._adapters[name]
        self._crowd = 2 * max(self._size, len(self._adapters))

    def _activity(self, adapter: _Adapter, now: float) -> float:
        return float(adapter.activity * 0.5 ** ((now - adapter.seen) / HALF_LIFE_S))


def _escaped(adapter: str) -> str:
    return f"{adapter}_" if adapter in (BASE, OTHER) else adapter
