"""What a server remembers of its adapters: over a restart, and when the file is damaged or its disk is full."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from hydraserve.adapters.registry import AdapterEntry, Journal, Origin, Registry
from hydraserve.errors import ConfigError, StorageError

FILE = "adapters.sqlite"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path)
    yield journal
    journal.close()


def names(folder: Path) -> list[str]:
    journal = Journal(folder)
    found = [entry.name for entry in Registry(journal)]
    journal.close()
    return found


def test_entries_of_the_api_come_back_in_their_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    registry = Registry(journal)
    for i, name in enumerate(("zeta", "alpha", "gone")):
        registry.put(AdapterEntry(name, f"/x/{name}", Origin.API, registered_at=float(i)))
    registry.put(AdapterEntry("given", "/x/given", Origin.COMMAND_LINE))
    registry.remove("gone")
    journal.close()
    assert names(tmp_path) == ["zeta", "alpha"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda _: b"this is no database " * 300, id="another file"),
        pytest.param(lambda data: data[:100] + b"\xff" * (len(data) - 100), id="overwritten"),
        pytest.param(lambda data: data[: len(data) // 2 + 7], id="cut short"),
    ],
)
def test_an_unreadable_file_is_kept_and_the_server_starts(
    damage: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Journal(tmp_path)
    first.put(AdapterEntry("before", "/x/before", Origin.API))
    first.close()
    damaged = damage((tmp_path / FILE).read_bytes())  # type: ignore[operator]
    (tmp_path / FILE).write_bytes(damaged)
    with caplog.at_level(logging.ERROR):
        journal = Journal(tmp_path)
    assert journal.entries() == []
    assert journal.set_aside is not None
    assert journal.set_aside.read_bytes() == damaged
    assert str(journal.set_aside) in caplog.text
    journal.put(AdapterEntry("after", "/x/after", Origin.API))
    journal.close()
    assert names(tmp_path) == ["after"]


def test_a_table_of_another_version_is_set_aside_too(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("CREATE TABLE adapters (name TEXT, what INTEGER)")
        other.execute("INSERT INTO adapters VALUES ('x', 1)")
    journal = Journal(tmp_path)
    assert journal.set_aside is not None
    journal.close()


@pytest.mark.usefixtures("journal")
def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another server"):
        Journal(tmp_path)


def test_a_full_disk_is_told_and_changes_nothing(journal: Journal) -> None:
    registry = Registry(journal)
    registry.put(AdapterEntry("before", "/x/before", Origin.API))
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageError, match="full"):
        registry.put(AdapterEntry("large", "/x/" + "long" * 100_000, Origin.API))
    assert [entry.name for entry in registry] == ["before"]


def test_the_order_is_kept_when_the_clock_jumps_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of day are shown and never subtracted; a clock that is set back must not lose or mix up entries."""
    journal = Journal(tmp_path)
    registry = Registry(journal)
    for now in (2e9, 1e9):
        monkeypatch.setattr("time.time", lambda now=now: now)
        registry.put(AdapterEntry(f"at-{now:.0f}", "/x", Origin.API, registered_at=now))
    journal.close()
    assert sorted(names(tmp_path)) == ["at-1000000000", "at-2000000000"]
