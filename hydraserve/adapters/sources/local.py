"""Adapters in folders of this machine."""

from __future__ import annotations

from pathlib import Path

from hydraserve.adapters.archives import is_archive
from hydraserve.adapters.locate import locate
from hydraserve.adapters.sources.policy import SourcePolicy


def local_path(path: Path, policy: SourcePolicy) -> Path:
    """The real path of an adapter's folder or archive, if all that would be read lies below allowed folders.

    Raises SourceForbiddenError (also for a symbolic link that leads out), AdapterNotFoundError, UnreadableFileError.
    """
    real = policy.check_path(path)
    if real.is_file() and is_archive(real.name):
        return real
    files = locate(real)
    for file in files.paths:
        policy.check_path(file)
    return real
