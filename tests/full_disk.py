"""A disk that takes no more."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def full_disk(limit: int, processes: Sequence[int] = (0,)) -> Iterator[None]:
    """No file of these processes (0: this one) may grow beyond `limit` bytes; writing more fails as on a full disk."""
    old = [resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)) for pid in processes]
    try:
        yield
    finally:
        for pid, was in zip(processes, old, strict=True):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, was)
