"""Where adapters come from: a source, as a user writes it, becomes a folder that can be read.

./adapters/sql              a folder (also file:///...)
hf://org/name@revision      a repository of the Hugging Face Hub
s3://bucket/adapters/sql    a folder of any file system that fsspec knows
https://host/sql.tar.gz     an archive: .tar, .tar.gz, or one .safetensors that holds its configuration too
"""

from __future__ import annotations

from pathlib import Path

from hydraserve.adapters.sources.local import local_folder
from hydraserve.adapters.sources.policy import SourcePolicy, split_scheme, without_secrets
from hydraserve.adapters.sources.progress import Progress
from hydraserve.errors import SourceForbiddenError

__all__ = ["Progress", "SourcePolicy", "fetch", "split_scheme", "without_secrets"]


def fetch(source: str, policy: SourcePolicy, scratch: Path, progress: Progress) -> Path:
    """The folder of the adapter at `source`: the source itself, or what was downloaded or unpacked into `scratch`.

    scratch: an empty folder of the caller's, who removes it afterwards.

    Raises SourceForbiddenError, SourceError, LimitError, and AdapterError's subclasses for what is not there.
    """
    scheme, path = split_scheme(source)
    if not scheme:
        return local_folder(Path(path), policy)
    raise SourceForbiddenError("source", got=scheme)
