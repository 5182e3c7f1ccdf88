"""A folder for the files of one running server, which does not outlive it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = "lock"


class ScratchFolder:
    """`path`: an empty folder below `parent`, of this process alone until `remove`. Folders that servers left behind
    when they were killed are removed on the way."""

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(parent / _LOCK):  # nobody takes the new folder for one that was left behind
            for left in parent.iterdir():
                if left.is_dir():
                    _remove_if_left(left)
            self.path = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
            self._held = FileLock(self.path / _LOCK)
            self._held.acquire()

    def remove(self) -> None:
        """Delete the folder and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._held.release()


def _remove_if_left(folder: Path) -> None:
    held = FileLock(folder / _LOCK)
    with contextlib.suppress(Timeout, OSError):
        held.acquire(timeout=0)
        shutil.rmtree(folder, ignore_errors=True)
        held.release()
