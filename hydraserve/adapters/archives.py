"""Adapters in one file: .tar, .tar.gz, and .safetensors with the configuration in its metadata.

An archive may have been made by anybody: nothing is written outside the folder it is unpacked into, no links are made,
and no more memory or disk is taken than the limits allow, whatever its headers say.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from hydraserve.adapters.files import JsonError, is_full, open_regular, parse_object, unreadable, unwritable, writing
from hydraserve.adapters.limits import AdapterLimits
from hydraserve.adapters.locate import CONFIG_NAME, SAFETENSORS_NAME
from hydraserve.errors import AdapterNotFoundError, UnreadableFileError, UnsafeFileError

# The key of a .safetensors file's metadata under which adapter_config.json is kept, as JSON text.
METADATA_CONFIG = "adapter_config"

_TAR, _GZIPPED, _SINGLE = (".tar",), (".tar.gz", ".tgz"), (".safetensors",)
_MEMBERS = 1_000
# What tarfile reads in one piece: headers with long names. A piece as large as a whole file is an attack.
_PIECE = 1 << 20
# Besides the files themselves: tar's headers and padding.
_OVERHEAD = 16 << 20


def is_archive(name: str) -> bool:
    """Whether a file of this name can be an archive with an adapter."""
    return name.lower().endswith(_TAR + _GZIPPED + _SINGLE)


def archive_stem(name: str) -> str:
    """An archive's name without what says its kind."""
    ending = next((end for end in (*_GZIPPED, *_TAR, *_SINGLE) if name.lower().endswith(end)), "")
    return name.removesuffix(name[len(name) - len(ending) :])


@contextmanager
def opened(path: Path, limits: AdapterLimits, temporary: Path) -> Iterator[Path]:
    """The folder of an adapter: `path`, or what is in the archive there, unpacked for as long as the context lasts.

    temporary: an existing folder for that.

    Raises AdapterError's subclasses for an archive that cannot be, or should not be, unpacked.
    """
    if not path.is_file():
        yield path
        return
    with writing(temporary):
        unpacked = tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=temporary)
    with unpacked as folder:
        unpack(path, Path(folder), limits)
        yield _only_folder(Path(folder))


def unpack(archive: Path, folder: Path, limits: AdapterLimits) -> None:
    """Unpack an archive into an empty folder.

    Raises UnsafeFileError, UnreadableFileError, LimitError; StorageError when the folder's disk is full.
    """
    name = archive.name.lower()
    with open_regular(archive) as file:
        limits.check(f"size of {archive.name}", file.seek(0, 2), limits.file_bytes, unit=" bytes")
        file.seek(0)
        try:
            if name.endswith(_SINGLE):
                _unpack_single(archive, file, folder, limits)
            elif name.endswith(_GZIPPED):
                with gzip.GzipFile(fileobj=file) as plain:
                    _unpack_tar(archive.name, cast(BinaryIO, plain), folder, limits)
            else:
                _unpack_tar(archive.name, file, folder, limits)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, UnicodeError, ValueError) as error:
            raise _damaged(archive.name, error) from error
        except RecursionError as error:
            raise _unsafe(archive.name, "headers nested without end") from error
        except OSError as error:
            raise (unwritable(folder, error) if is_full(error) else unreadable(archive, error)) from error


class _Bounded(io.RawIOBase):
    """A stream that gives `limit` bytes and no more, each time at most `_PIECE`."""

    def __init__(self, stream: BinaryIO, name: str, limit: int) -> None:
        self._stream, self._name, self._limit = stream, name, limit

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and offset > self._limit:
            raise _unsafe(self._name, f"content that is said to go on to byte {offset:,}")
        return self._stream.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _PIECE:
            raise _unsafe(self._name, f"a header of {size:,} bytes")
        if self._stream.tell() + size > self._limit:
            raise _unsafe(self._name, f"more than {self._limit:,} bytes when unpacked")
        return self._stream.read(size)


def _unpack_tar(name: str, stream: BinaryIO, folder: Path, limits: AdapterLimits) -> None:
    bounded = _Bounded(stream, name, limits.file_bytes + limits.config_bytes + _OVERHEAD)
    taken = members = 0
    with tarfile.open(fileobj=bounded, mode="r:") as tar:
        for member in tar:
            members += 1
            limits.check(f"files in {name}", members, _MEMBERS)
            if member.isdir():
                continue
            if member.name.startswith("/") or not member.isreg() or member.issparse():
                raise _unsafe(name, f"{member.name!r}, an absolute path, link, device or sparse file")
            taken += member.size
            limits.check(f"size of {name} when unpacked", taken, limits.file_bytes, unit=" bytes")
            try:
                tar.extract(member, folder, set_attrs=False, filter="data")
            except tarfile.FilterError as error:
                raise _unsafe(name, f"{member.name!r}: {error}") from error
    if not members:
        raise _damaged(name, "no files")
    while bounded.read(_PIECE):  # to the checksum at the end, where there is one
        pass


def _unpack_single(archive: Path, file: BinaryIO, folder: Path, limits: AdapterLimits) -> None:
    length = int.from_bytes(file.read(8), "little")
    limits.check(f"header of {archive.name}", length, limits.header_bytes, unit=" bytes")
    try:
        metadata = parse_object(file.read(length)).get("__metadata__")
    except JsonError as error:
        raise _damaged(archive.name, f"a header that is not JSON: {error}") from error
    config = metadata.get(METADATA_CONFIG) if isinstance(metadata, dict) else None
    if not isinstance(config, str):
        raise AdapterNotFoundError(
            archive.name,
            got=f"no {METADATA_CONFIG!r} in its metadata",
            expected=f"the text of {CONFIG_NAME} there",
            fix=f"write it there, or give a folder (or .tar) with {CONFIG_NAME} and {SAFETENSORS_NAME}",
        )
    (folder / CONFIG_NAME).write_text(config)
    (folder / SAFETENSORS_NAME).symlink_to(archive.absolute())


def _only_folder(folder: Path) -> Path:
    """Where the files are: many archives hold one folder, and the adapter in that."""
    while len(inside := list(folder.iterdir())) == 1 and inside[0].is_dir():
        folder = inside[0]
    return folder


def _unsafe(name: str, got: str) -> UnsafeFileError:
    return UnsafeFileError(
        name, got=got, expected="an archive of plain files below its own folder", fix="pack the adapter's folder again"
    )


def _damaged(name: str, got: object) -> UnreadableFileError:
    return UnreadableFileError(
        name, got=got, expected="a whole .tar, .tar.gz or .safetensors file", fix="copy the archive again"
    )
