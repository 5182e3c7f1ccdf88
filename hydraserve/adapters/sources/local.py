"""Adapters in folders of this machine."""

from __future__ import annotations

from pathlib import Path

from hydraserve.adapters.locate import locate
from hydraserve.adapters.sources.policy import SourcePolicy


def local_folder(path: Path, policy: SourcePolicy) -> Path:
    """The real path of an adapter's folder, if it and the files that would be read lie below allowed folders.

    Raises SourceForbiddenError (also for a symbolic link that leads out), AdapterNotFoundError, UnreadableFileError.
    """
    folder = policy.check_path(path)
    files = locate(folder)
    for file in files.paths:
        policy.check_path(file)
    return folder
