"""Main memory for packed weights, in huge pages where the system has them."""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch

# A mapping holds the weights of many layers of an adapter: one layer's alone (tens to hundreds of KiB) would not fill
# a huge page (2 MiB). Small enough that an adapter which outlives its neighbours keeps little of theirs.
CHUNK = 8 << 20
ALIGNMENT = 64  # bytes: a cache line


class Arena:
    """Hands out blocks of memory one after the other; a mapping goes back to the system with its last block.

    Adapters' weights are read once per step in pieces of some hundred KiB, so that with pages of 4 KiB much of the
    time would go into translating addresses.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8, zeros, its address a multiple of ALIGNMENT. Freed like any tensor."""
        if nbytes > CHUNK // 4:
            return _mapping(nbytes)[:nbytes]
        with self._lock:
            if self._used + nbytes > len(self._chunk):
                self._chunk, self._used = _mapping(CHUNK), 0
            block = self._chunk[self._used : self._used + nbytes]
            self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return block


def _mapping(nbytes: int) -> torch.Tensor:
    """Anonymous memory, unmapped when the last tensor that looks at it is gone."""
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
