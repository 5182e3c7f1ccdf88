"""How far a download is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Bytes that have come, and that will come; 0 while that is not known. Written by one thread, read by any.

    stopped: set by any thread when the download is not wanted any more.
    """

    done: int = 0
    total: int = 0
    stopped: bool = False
