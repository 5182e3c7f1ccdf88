"""Where adapters come from: a source, as a user writes it, becomes a path that can be read.

./adapters/sql              a folder, or an archive (also file:///...)
hf://org/name@revision      a repository of the Hugging Face Hub, or a folder in it: hf://org/name@revision/folder
s3://bucket/adapters/sql    a folder of any file system that fsspec knows
https://host/sql.tar.gz     an archive there: .tar, .tar.gz, or one .safetensors that holds its configuration too
"""

from __future__ import annotations

from pathlib import Path

from hydraserve.adapters.sources.cache import DownloadCache
from hydraserve.adapters.sources.local import local_path
from hydraserve.adapters.sources.policy import SourcePolicy, split_scheme, without_secrets
from hydraserve.adapters.sources.progress import Progress
from hydraserve.adapters.sources.remote import fetch_remote

__all__ = ["DownloadCache", "Progress", "SourcePolicy", "fetch", "split_scheme", "without_secrets"]


def fetch(source: str, policy: SourcePolicy, scratch: Path, progress: Progress, cache: DownloadCache) -> Path:
    """The folder or archive of the adapter at `source`: the source itself, or what was downloaded into `scratch`.

    scratch: an empty folder of the caller's, who removes it afterwards.
    cache:   keeps downloads; best on the same disk as `scratch`.

    Raises SourceForbiddenError, SourceError, LimitError, and AdapterError's subclasses for what is not there.
    """
    scheme, path = split_scheme(source)
    if not scheme:
        return local_path(Path(path), policy)
    return fetch_remote(source, policy, scratch, progress, cache)
