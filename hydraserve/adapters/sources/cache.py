"""Downloads that were made before: an adapter that is loaded again, after a restart or by another replica on the same
machine, is not fetched again as long as its source says that it did not change."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path

from hydraserve.adapters.limits import GIB

# Of all downloads together; the ones used longest ago go first.
_LARGEST = 16 * GIB


class DownloadCache:
    """Folders by key below `root`. They appear and go whole, so that several processes may share one cache."""

    def __init__(self, root: Path, largest: int = _LARGEST) -> None:
        self._root, self._largest = root, largest

    def take(self, key: str, folder: Path) -> bool:
        """Bring the files of an earlier download into the empty `folder`; False when there is none."""
        kept = self._root / key
        try:
            for file in kept.iterdir():
                _link(file, folder / file.name)
            os.utime(kept)
        except FileNotFoundError:  # never there, or another process took it away at this moment
            for file in folder.iterdir():
                file.unlink()
            return False
        return True

    def put(self, key: str, folder: Path) -> None:
        """Keep the files in `folder`. They are not copied where that can be avoided: they must not be changed then.
        Without room on the disk nothing is kept."""
        part = self._root / f".{uuid.uuid4().hex}"
        try:
            part.mkdir(parents=True, mode=0o700)
            for file in folder.iterdir():
                _link(file, part / file.name)
            os.rename(part, self._root / key)
        except OSError:  # also when another process was first
            shutil.rmtree(part, ignore_errors=True)
        self._shrink()

    def _shrink(self) -> None:
        used = 0
        for folder in sorted(self._folders(), key=_age):
            with contextlib.suppress(FileNotFoundError):  # another process was first
                used += sum(file.stat().st_size for file in folder.iterdir())
            if used > self._largest:
                going = self._root / f".{uuid.uuid4().hex}"
                with contextlib.suppress(OSError):
                    os.rename(folder, going)  # so that nobody finds half of it
                    shutil.rmtree(going, ignore_errors=True)

    def _folders(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return [path for path in self._root.iterdir() if not path.name.startswith(".")]
        return []


def _age(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return -folder.stat().st_mtime
    return 0.0


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
