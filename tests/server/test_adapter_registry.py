"""What a server remembers of its adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_runtime import stored

from hydraserve.adapters.registry import AdapterEntry, Journal, Origin, Registry, check_name
from hydraserve.errors import AdapterConfigError, ConfigError, UnknownAdapterError


@pytest.mark.parametrize("name", ["a", "sql-v1.2", "team/sql", "org:model", "a" * 128, "A_b+c"])
def test_names_that_may_be(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["", "a" * 129, "-a", "/a", "a//b", "a/../b", "a@b", "a b", "a\n", "ä", "a\0"])
def test_names_that_may_not_be(name: str) -> None:
    with pytest.raises(AdapterConfigError, match="name"):
        check_name(name)


def test_a_journal_keeps_what_came_through_the_api(tmp_path: Path) -> None:
    there = tmp_path / "content.safetensors"
    there.touch()
    content = stored("x")
    kept = type(content)(**{**{f: getattr(content, f) for f in content.__dataclass_fields__}, "path": str(there)})
    journal = Journal(tmp_path / "state")
    registry = Registry(journal)
    registry.put(AdapterEntry("kept", "s3://bucket/x", Origin.API, pinned=True, version=kept, load_seconds=1.5))
    registry.put(AdapterEntry("unread", "hf://org/x", Origin.API))
    registry.put(AdapterEntry("lost", "y", Origin.API, version=content))
    registry.put(AdapterEntry("removed", "z", Origin.API))
    registry.put(AdapterEntry("given", "z", Origin.COMMAND_LINE))
    registry.put(AdapterEntry("found", "z", Origin.DIRECTORY))
    registry.remove("removed")
    registry.remove("never there")
    journal.close()

    journal = Journal(tmp_path / "state")
    again = Registry(journal)
    assert [entry.name for entry in again] == ["kept", "unread", "lost"]
    entry = again.get("kept")
    assert (entry.source, entry.pinned, entry.version, entry.load_seconds) == ("s3://bucket/x", True, kept, 1.5)
    assert again.get("unread").version is None
    assert again.get("lost").version is None, "its copy is gone: to be read from its source again"
    assert again.uses(kept.digest)
    with pytest.raises(UnknownAdapterError):
        again.get("given")
    journal.close()


def test_a_state_folder_has_one_server(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    with pytest.raises(ConfigError, match="another server"):
        Journal(tmp_path)
    first.close()
    Journal(tmp_path).close()
