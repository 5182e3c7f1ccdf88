"""Times of short calls on a GPU: interleaved, with cold caches, as medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

# More than the L2 of any GPU; and writing it takes the GPU longer than the CPU takes to enqueue what is measured,
# so that the launches wait for the GPU and not the GPU for the launches.
FLUSH_BYTES = 1 << 30


class Timer:
    """Measures calls that are compared with one another.

    On a GPU: events around each call, after a write that evicts the L2. On a CPU, for dry runs: the wall clock.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def medians(self, calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        """Microseconds of each call: the median over `rounds` rounds, in each of which all are called in turn."""
        for call in calls.values():
            call()
        times: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(self._once(call))
        if self.cuda:
            torch.cuda.synchronize()
        return {name: statistics.median(read() for read in reads) for name, reads in times.items()}

    def _once(self, call: Callable[[], object]) -> Callable[[], float]:
        """Calls it; what is returned gives the microseconds, on a GPU only after a synchronisation."""
        if not self.cuda:
            before = time.perf_counter()
            call()
            spent = (time.perf_counter() - before) * 1e6
            return lambda: spent
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.flush.zero_()
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end) * 1e3

    def copy_bandwidth(self, size: int = FLUSH_BYTES) -> float:
        """Bytes read plus bytes written each second by a copy of `size` bytes on the device."""
        source = torch.empty(size, dtype=torch.int8, device=self.flush.device)
        target = torch.empty_like(source)
        return 2 * size / (self.medians({"copy": lambda: target.copy_(source)}, 15)["copy"] * 1e-6)
