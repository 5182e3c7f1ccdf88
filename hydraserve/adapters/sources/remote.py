"""Adapters behind a URL, fetched through fsspec: the Hub, S3, HTTP, and whatever else has a file system for it."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import fsspec  # type: ignore[import-untyped]

from hydraserve.adapters.archives import is_archive
from hydraserve.adapters.files import is_full, unwritable, writing
from hydraserve.adapters.limits import AdapterLimits
from hydraserve.adapters.locate import ARGUMENTS_NAMES, CONFIG_NAME, OTHER_WEIGHTS_NAME, TRAINER_NAMES, WEIGHTS_NAMES
from hydraserve.adapters.sources.cache import DownloadCache
from hydraserve.adapters.sources.hub import pinned
from hydraserve.adapters.sources.policy import SourcePolicy, split_scheme, without_secrets
from hydraserve.adapters.sources.progress import Progress
from hydraserve.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    LimitError,
    SourceError,
    SourceForbiddenError,
)

_ATTEMPTS = 3
_FIRST_PAUSE_S = 0.5
_BLOCK = 4 << 20  # bytes in memory at a time
_URL = re.compile(r"([a-z][a-z0-9+.-]*://[^\s'\"?]*)\?[^\s'\"]*", re.IGNORECASE)
# Things of a file's information that change when its content does, in the order of trust.
_FINGERPRINTS = ("sha256", "xet_hash", "blob_id", "ETag", "etag", "md5Hash", "Content-MD5", "LastModified")

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch.

    size:        in bytes; None when the server does not say.
    fingerprint: changes when the content does; None when the server gives none.
    sha256:      of the content, where the server says.
    """

    path: str
    name: str
    size: int | None
    fingerprint: str | None
    sha256: str | None

    @classmethod
    def of(cls, path: str, info: dict[str, Any]) -> RemoteFile:
        lfs = info.get("lfs")
        sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
        known = {**info, "sha256": sha256}
        fingerprint = next((f"{key}={known[key]}" for key in _FINGERPRINTS if known.get(key)), None)
        return cls(path, path.partition("?")[0].rpartition("/")[2], info.get("size"), fingerprint, sha256)


def fetch_remote(source: str, policy: SourcePolicy, scratch: Path, progress: Progress, cache: DownloadCache) -> Path:
    """See `sources.fetch`."""
    check_remote(source, policy)
    folder = scratch / "download"
    with writing(scratch):
        folder.mkdir()
    remote = _Remote(source, policy.limits, folder)
    files = remote.retry(remote.list_files)
    progress.total = sum(file.size or 0 for file in files)
    key = remote.key(files)
    with writing(scratch):
        taken = key is not None and cache.take(key, folder)
    if not taken:
        for file in files:
            before = progress.done
            remote.retry(partial(remote.download, file, folder, progress, before))
        if key is not None:
            cache.put(key, folder)
    progress.done = progress.total = sum(file.stat().st_size for file in folder.iterdir())
    return folder / files[0].name if len(files) == 1 else folder


def check_remote(source: str, policy: SourcePolicy) -> None:
    """Raises SourceForbiddenError for what the operator did not allow, however it is written."""
    policy.check_url(source)
    path = unquote(source.partition("?")[0]).replace("\\", "/")
    if "::" in path or "/../" in f"{path}/" or not path.isprintable():
        raise SourceForbiddenError(
            "source",
            got=without_secrets(source),
            expected="a URL without '..', '::' and control characters",
            fix="write the URL of the adapter itself",
        )


class _Remote:
    """One source, while it is fetched into a folder."""

    def __init__(self, source: str, limits: AdapterLimits, folder: Path) -> None:
        self._shown, self._limits, self._folder = without_secrets(source), limits, folder
        self._source = source
        self._url = self.retry(partial(pinned, source)) if split_scheme(source)[0] == "hf" else source
        self._fs, self._path = self._file_system()

    def _file_system(self) -> tuple[Any, str]:
        scheme = split_scheme(self._url)[0]
        try:
            # No instances and listings of earlier calls: what is behind a URL may have changed since.
            options = {"skip_instance_cache": True, "use_listings_cache": False}
            file_system, path = fsspec.core.url_to_fs(self._url, **options)
        except (ImportError, ValueError) as error:
            raise SourceError(
                f"{scheme}://",
                got=self._scrub(error),
                expected="a scheme that fsspec has a file system for",
                fix="install the package that the message names, or use another scheme",
            ) from error
        if "file" in _protocols(file_system) or "local" in _protocols(file_system):
            raise SourceForbiddenError(
                "source", got=self._shown, expected="a path, for a folder of this machine", fix="give the path alone"
            )
        return file_system, path

    def list_files(self) -> list[RemoteFile]:
        """The archive, or the files of the folder that an adapter is read from."""
        if is_archive(self._path.partition("?")[0]):
            file = self._find(self._path)
            if file is None:
                raise self._missing("no such file")
            return [file]
        base, question, query = self._path.partition("?")
        paths = {name: f"{base.rstrip('/')}/{name}{question}{query}" for name in _NAMES}
        found = {name: file for name, path in paths.items() if (file := self._find(path)) is not None}
        weights = next((found[name] for name in WEIGHTS_NAMES + TRAINER_NAMES if name in found), None)
        if CONFIG_NAME not in found or weights is None:
            raise self._missing(f"only {', '.join(found) or 'nothing that is known'} there")
        return [weights, found[CONFIG_NAME], *(found[name] for name in _OTHERS if name in found)]

    def _find(self, path: str) -> RemoteFile | None:
        try:
            info = self._fs.info(path, **({"expand_info": True} if "hf" in _protocols(self._fs) else {}))
        except (FileNotFoundError, IsADirectoryError) as error:
            _refuse_other_status(error)
            return None
        if info.get("type", "file") != "file":
            return None
        file = RemoteFile.of(path, info)
        self._limits.check(f"size of {file.name}", file.size or 0, self._limit(file), unit=" bytes")
        return file

    def _limit(self, file: RemoteFile) -> int:
        return self._limits.config_bytes if file.name == CONFIG_NAME else self._limits.file_bytes

    def key(self, files: list[RemoteFile]) -> str | None:
        """Under which the download is kept; None when its content could change unseen."""
        if any(file.fingerprint is None for file in files):
            return None
        parts = [self._url, *(f"{file.name} {file.size} {file.fingerprint}" for file in files)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def download(self, file: RemoteFile, folder: Path, progress: Progress, before: int) -> None:
        """Fetch one file whole, or leave nothing. before: `progress.done` when it began."""
        progress.done, limit = before, self._limit(file)
        digest, size = hashlib.sha256(), 0
        target = folder / file.name
        try:
            with self._fs.open(file.path, "rb", **self._how(file)) as stream, target.open("wb") as out:
                while block := stream.read(min(_BLOCK, (file.size or limit) - size + 1)):
                    if progress.stopped:
                        raise self._stopped()
                    size += len(block)
                    self._limits.check(f"size of {file.name}", size, limit, unit=" bytes")
                    out.write(block)
                    digest.update(block)
                    progress.done = before + size
                    if file.size is not None and size >= file.size:
                        break
            if file.size is not None and size != file.size:
                raise self._failed(f"{size:,} bytes of {file.name}", f"{file.size:,} bytes, as announced")
            if file.sha256 is not None and digest.hexdigest() != file.sha256:
                raise self._failed(f"{file.name} with SHA-256 {digest.hexdigest()}", f"{file.sha256}, as announced")
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def _how(self, file: RemoteFile) -> dict[str, Any]:
        """Read in blocks, where the server can; else as one stream."""
        if file.size is None or "hf" in _protocols(self._fs):
            return {"block_size": 0}
        return {"block_size": _BLOCK, "cache_type": "readahead"}

    def retry(self, work: Callable[[], T]) -> T:
        """What `work` gives, in a few attempts when the network is at fault. Raises SourceError when all fail."""
        pause = _FIRST_PAUSE_S
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return work()
            except (LimitError, SourceForbiddenError, AdapterNotFoundError, AdapterConflictError):
                raise
            except FileNotFoundError as error:
                raise self._missing(self._scrub(error)) from error
            except PermissionError as error:
                raise self._failed(self._scrub(error), "permission to read it") from error
            except Exception as error:  # each file system has its own
                if is_full(error):
                    raise unwritable(self._folder, error) from error
                if attempt == _ATTEMPTS:
                    if isinstance(error, SourceError):
                        raise
                    raise self._failed(f"{type(error).__name__}: {self._scrub(error)}", "a download") from error
            time.sleep(pause)
            pause *= 2
        raise AssertionError("not reached")

    def _scrub(self, error: object) -> str:
        """An error's text without what may be a signature or a password."""
        text = str(error).replace(self._source, self._shown)
        return without_secrets(_URL.sub(r"\1", text))

    def _failed(self, got: str, expected: str) -> SourceError:
        return SourceError(f"source {self._shown}", got=got, expected=expected, fix="check the source and try again")

    def _stopped(self) -> AdapterConflictError:
        return AdapterConflictError(
            f"source {self._shown}",
            got="the removal of its adapter during the download",
            expected="an adapter that is wanted",
            fix="load it again",
        )

    def _missing(self, got: str) -> AdapterNotFoundError:
        return AdapterNotFoundError(
            f"source {self._shown}",
            got=got,
            expected=f"a folder with {CONFIG_NAME} and a file of weights, or an archive",
            fix="check its spelling and the credentials for it",
        )


def _refuse_other_status(error: OSError) -> None:
    """Raises what fsspec's file system for HTTP hides: it calls every answer without the file a file not found."""
    status = getattr(error.__cause__, "status", None)
    unreachable = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)
    if unreachable or status not in (None, 404, 410):
        raise ConnectionError(f"HTTP status {status}" if status else str(error.__cause__)) from error


_OTHERS = (OTHER_WEIGHTS_NAME, *ARGUMENTS_NAMES)
_NAMES = (CONFIG_NAME, *WEIGHTS_NAMES, *TRAINER_NAMES, *_OTHERS)


def _protocols(file_system: Any) -> tuple[str, ...]:
    given = file_system.protocol
    return (given,) if isinstance(given, str) else tuple(given)
