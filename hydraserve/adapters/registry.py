"""Which adapters a server has: name -> source, version, and what was asked for it. Kept over a restart where wanted."""

from __future__ import annotations

import logging
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from filelock import FileLock, Timeout

from hydraserve.adapters.store import StoredAdapter
from hydraserve.errors import AdapterConfigError, ConfigError, HydraServeError, StorageError, UnknownAdapterError

logger = logging.getLogger(__name__)

_JOURNAL = "adapters.sqlite"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+/-]{0,127}")


class Origin(StrEnum):
    """Who asked for an adapter, and so who takes it away again."""

    COMMAND_LINE = "command line"
    DIRECTORY = "directory"
    API = "api"
    DERIVED = "derived"  # by a request that named it, see `derive`; it goes with the adapter it is made from


@dataclass
class AdapterEntry:
    """One name that requests may use.

    source:       where its files come from, as it was given.
    given:        the source on the command line, which may be anywhere; None for entries of other origins.
    version:      what is served under the name; None while nothing has been read yet.
    failure:      why the last reading failed, and `failed_at` when, by the monotonic clock.
    load_seconds: how long fetching, reading and checking took.
    read_at:      when that was, seconds since the epoch.
    """

    name: str
    source: str
    origin: Origin
    given: str | None = None
    pinned: bool = False
    version: StoredAdapter | None = None
    failure: HydraServeError | None = None
    failed_at: float = 0.0
    load_seconds: float | None = None
    read_at: float | None = None
    registered_at: float = field(default_factory=time.time)


def check_name(name: str) -> None:
    """Raises AdapterConfigError for a name that cannot be an adapter's."""
    if not _NAME.fullmatch(name) or "//" in name or ".." in name:
        raise AdapterConfigError(
            "name",
            got=repr(name),
            expected="1 to 128 letters, digits and . _ : + / -, the first a letter or digit, without '..' and '//'",
            fix="choose another name",
        )


class Registry:
    """The entries, by name. With a `journal`, those that came through the API survive a restart."""

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self._entries: dict[str, AdapterEntry] = {}
        for entry in journal.entries() if journal else ():
            self._entries[entry.name] = entry

    def __iter__(self) -> Iterator[AdapterEntry]:
        return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, name: str) -> AdapterEntry | None:
        return self._entries.get(name)

    def get(self, name: str) -> AdapterEntry:
        """Raises UnknownAdapterError."""
        entry = self._entries.get(name)
        if entry is None:
            raise UnknownAdapterError(what="adapter", got=repr(name), expected="a name that is served")
        return entry

    def put(self, entry: AdapterEntry) -> None:
        """Add an entry, or write down that it has changed. Raises StorageError."""
        if self._journal and entry.origin is Origin.API:
            self._journal.put(entry)
        self._entries[entry.name] = entry

    def remove(self, name: str) -> None:
        """Nothing happens when it is not there. Raises StorageError."""
        if self._journal:
            self._journal.remove(name)
        self._entries.pop(name, None)

    def uses(self, digest: str) -> bool:
        """Whether any name stands for this content."""
        return any(entry.version is not None and entry.version.digest == digest for entry in self._entries.values())


class Journal:
    """The entries of one server in an SQLite file. Raises ConfigError when another server has it open, or when nothing
    can be written there.

    set_aside: where a file went that could not be read; the server starts without what it remembered.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._held = FileLock(folder / "lock")
        try:
            self._held.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                what="--state-dir",
                got=f"{folder}, which another server uses",
                expected="a folder of its own for each server",
                fix="stop the other server, or give another folder",
            ) from error
        self._lock = threading.Lock()
        self.set_aside: Path | None = None
        path = folder / _JOURNAL
        try:
            self._db = _open(path)
            self._entries = self._read()
        except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
            self.set_aside = _set_aside(path, error)
            self._db = _open(path)
            self._entries = []

    def entries(self) -> list[AdapterEntry]:
        """What was there when the journal was opened, in the order in which it was registered."""
        return list(self._entries)

    def _read(self) -> list[AdapterEntry]:
        rows = self._db.execute("SELECT * FROM adapters ORDER BY registered_at").fetchall()
        return [self._entry(*row) for row in rows]

    def _entry(
        self,
        name: str,
        source: str,
        pinned: int,
        version: str | None,
        load_seconds: float | None,
        read_at: float | None,
        registered_at: float,
    ) -> AdapterEntry:
        stored = StoredAdapter.from_json(version) if version else None
        if stored is not None and not Path(stored.path).is_file():
            stored = None  # to be read from its source again
        return AdapterEntry(
            name,
            source,
            Origin.API,
            pinned=bool(pinned),
            version=stored,
            load_seconds=load_seconds,
            read_at=read_at,
            registered_at=registered_at,
        )

    def put(self, entry: AdapterEntry) -> None:
        version = entry.version.to_json() if entry.version else None
        fields = (entry.name, entry.source, entry.pinned, version, entry.load_seconds, entry.read_at)
        self._write("REPLACE INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?)", (*fields, entry.registered_at))

    def remove(self, name: str) -> None:
        self._write("DELETE FROM adapters WHERE name = ?", (name,))

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            with self._lock:
                self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise StorageError(
                "state folder", got=str(error), expected="a disk that takes a row", fix="make room on it"
            ) from error

    def close(self) -> None:
        with self._lock:
            self._db.close()
        self._held.release()


def _open(path: Path) -> sqlite3.Connection:
    """The open journal at `path`, made if there is none. Raises sqlite3.Error for another file."""
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        # A crash of the server loses nothing; of the machine, at most the last entries. No waiting for the disk.
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute(
            "CREATE TABLE IF NOT EXISTS adapters (name TEXT PRIMARY KEY, source TEXT NOT NULL, "
            "pinned INTEGER NOT NULL, version TEXT, load_seconds REAL, read_at REAL, registered_at REAL NOT NULL)"
        )
    except BaseException:
        db.close()
        raise
    return db


def _set_aside(path: Path, reason: Exception) -> Path:
    """Rename a journal that cannot be read, with the files that SQLite keeps beside it, and say so."""
    kept = path.with_name(f"{path.name}.unreadable-{time.time_ns()}")
    for suffix in ("", "-wal", "-shm"):
        source = path.with_name(path.name + suffix)
        try:
            if source.exists():
                source.rename(kept.with_name(kept.name + suffix))
        except OSError as error:
            raise ConfigError(
                what="--state-dir",
                got=f"{path}, which cannot be read ({reason}) or renamed ({error.strerror})",
                expected="a folder that this server may write",
                fix="check its owner and permissions",
            ) from error
    logger.error("state of earlier runs cannot be read (%s); starting without it, the file is kept as %s", reason, kept)
    return kept
