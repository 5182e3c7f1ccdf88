"""Archives of adapters: what is in them is taken, and nothing else happens."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from full_disk import full_disk

from hydraserve.adapters.archives import METADATA_CONFIG, opened
from hydraserve.adapters.checkpoint import load_adapter
from hydraserve.adapters.limits import AdapterLimits
from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.errors import (
    AdapterError,
    AdapterNotFoundError,
    LimitError,
    StorageError,
    UnreadableFileError,
    UnsafeFileError,
)

SHAPES = {"model.layers.0.self_attn.q_proj": (64, 64)}
LIMITS = AdapterLimits()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "sql"
    save_adapter(make_adapter(SHAPES, ("q_proj",), 4, 3, seed=1), folder)
    return folder


def read(archive: Path, limits: AdapterLimits = LIMITS) -> str:
    """The digest of the adapter in an archive."""
    temporary = archive.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    try:
        with opened(archive, limits, temporary) as folder:
            return load_adapter(folder).digest
    finally:
        assert list(temporary.iterdir()) == [], "nothing may be left"


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")])
@pytest.mark.parametrize("inside", [".", "sql", "deep/sql"])
def test_tar(adapter: Path, name: str, mode: str, inside: str) -> None:
    archive = adapter.parent / name
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        tar.add(adapter, inside)
    assert read(archive) == load_adapter(adapter).digest


def test_safetensors_with_its_configuration(adapter: Path) -> None:
    """The tensors as PEFT saves them, the configuration as text in the metadata."""
    tensors = torch.load(adapter / "adapter_model.bin", weights_only=True)
    config = (adapter / "adapter_config.json").read_text()
    archive = adapter.parent / "sql.safetensors"
    safetensors.torch.save_file(tensors, archive, metadata={METADATA_CONFIG: config})
    assert read(archive) == load_adapter(adapter).digest
    safetensors.torch.save_file(tensors, archive)
    with pytest.raises(AdapterNotFoundError, match="adapter_config"):
        read(archive)


def member(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


HOSTILE: dict[str, Callable[[Path], tuple[tarfile.TarInfo, bytes]]] = {
    "climbs out": lambda _: member("../outside"),
    "absolute": lambda path: member(str(path / "outside")),
    "symbolic link": lambda _: member("adapter_config.json", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": lambda _: member("adapter_config.json", b"", type=tarfile.LNKTYPE, linkname="../outside"),
    "device": lambda _: member("adapter_config.json", b"", type=tarfile.CHRTYPE),
    "pipe": lambda _: member("adapter_config.json", b"", type=tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_plain_file_inside_is_refused(tmp_path: Path, kind: str) -> None:
    archive = tar_of(tmp_path / "bad.tar", member("fine"), HOSTILE[kind](tmp_path))
    with pytest.raises(UnsafeFileError):
        read(archive)
    assert not (tmp_path / "outside").exists()


def test_bombs_are_refused_while_they_are_small(tmp_path: Path) -> None:
    limits = replace(LIMITS, file_bytes=1_000_000)
    zeros = tar_of(tmp_path / "zeros.tar", member("adapter_model.bin", bytes(3_000_000)))
    bomb = tmp_path / "bomb.tar.gz"
    bomb.write_bytes(gzip.compress(zeros.read_bytes()))
    assert bomb.stat().st_size < 10_000
    with pytest.raises(LimitError, match="unpacked"):
        read(bomb, limits)

    long_name = tmp_path / "name.tar.gz"
    info, _ = member("n" * 3_000_000)
    long_name.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT)))
    with pytest.raises(UnsafeFileError, match="header of 3,"):
        read(long_name)

    many = tar_of(tmp_path / "many.tar", *(member(f"f{i}", b"") for i in range(1001)))
    with pytest.raises(LimitError, match="files in"):
        read(many)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "safetensors"])
def test_a_full_disk_is_not_the_archives_fault(adapter: Path, suffix: str) -> None:
    archive = adapter.parent / f"sql.{suffix}"
    if suffix == "safetensors":
        tensors = torch.load(adapter / "adapter_model.bin", weights_only=True)
        config = (adapter / "adapter_config.json").read_text()
        safetensors.torch.save_file(tensors, archive, metadata={METADATA_CONFIG: config})
    else:
        with tarfile.open(archive, "w:gz" if suffix == "tar.gz" else "w") as tar:
            tar.add(adapter, "sql")
    with full_disk(100), pytest.raises(StorageError, match="make room"):
        read(archive)
    with pytest.raises(StorageError, match="make room"), opened(archive, LIMITS, adapter / "no such folder"):
        pass
    assert read(archive)


def test_damaged_archives(adapter: Path) -> None:
    whole = adapter.parent / "whole.tar.gz"
    with tarfile.open(whole, "w:gz") as tar:
        tar.add(adapter, "sql")
    data = whole.read_bytes()
    broken = adapter.parent / "broken.tar.gz"
    for content in (b"", b"no archive", data[: len(data) // 2], data[:-4], data[:40] + b"\0" * 40 + data[80:]):
        broken.write_bytes(content)
        with pytest.raises(AdapterError):
            read(broken)
    single = adapter.parent / "broken.safetensors"
    for header in (b"", b"\xff" * 8, (10).to_bytes(8, "little") + b"not a JSON", b"\2" + bytes(7) + b"[]"):
        single.write_bytes(header)
        with pytest.raises((UnreadableFileError, LimitError, AdapterNotFoundError)):
            read(single)
    single.write_bytes(json.dumps({}).encode())
    with pytest.raises(AdapterError):
        read(single)
