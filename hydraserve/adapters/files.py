"""Opening and parsing what may be hostile: sizes first, then content, each fault a typed error."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from hydraserve.errors import AdapterNotFoundError, StorageError, UnreadableFileError

# Of a disk that takes no more, or of a file that the process may not make any larger.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


def open_regular(path: Path) -> BinaryIO:
    """Open for reading.

    Raises AdapterNotFoundError, or UnreadableFileError for what is not a plain file (opening a pipe would wait for
    ever) or may not be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise AdapterNotFoundError(path.name, got="no such file", fix="copy the adapter again") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UnreadableFileError(path.name, got="not a regular file", expected="a file", fix="copy the adapter again")
    return os.fdopen(handle, "rb")


def unreadable(path: Path, error: OSError) -> UnreadableFileError:
    """The typed error for a file that the operating system does not let us read."""
    return UnreadableFileError(
        path.name,
        got=error.strerror or str(error),
        expected="a readable file",
        fix="check the file and its permissions",
    )


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk takes no more."""
    return isinstance(error, OSError) and error.errno in _FULL


def unwritable(folder: Path, error: BaseException) -> StorageError:
    """The typed error for a folder of this server's own that the operating system does not let us write."""
    return StorageError(
        f"folder {folder}",
        got=getattr(error, "strerror", None) or str(error),
        expected="a folder that can be written",
        fix="make room on its disk",
    )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around work in a folder of this server's own. Raises StorageError when the operating system fails it."""
    try:
        yield
    except OSError as error:
        raise unwritable(folder, error) from error


class JsonError(ValueError):
    """Text that is not the JSON object we take."""


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object from UTF-8 text. Repeated keys and NaN, which `json` lets pass, are refused.

    Raises JsonError.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise JsonError("nested too deeply") from error
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, numbers of thousands of digits
        raise JsonError(str(error)) from error
    if not isinstance(value, dict):
        raise JsonError(f"a JSON {_JSON_NAMES.get(type(value), 'number')}, not an object")
    return value


_JSON_NAMES = {list: "array", str: "string", bool: "boolean", type(None): "null"}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise JsonError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return result


def _no_constant(name: str) -> None:
    raise JsonError(f"{name}, which is not JSON")
