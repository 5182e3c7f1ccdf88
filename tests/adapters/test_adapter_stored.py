"""The server's own copies of adapters: written, read again, and refused when they are not what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hydraserve.adapters import store
from hydraserve.adapters.store import AdapterStore, StoredAdapter, read_layouts, read_stored
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import AdapterNotFoundError, UnreadableFileError

SHAPES = {f"model.layers.{i}.self_attn.{name}": (40, 24) for i in range(3) for name in ("q_proj", "o_proj")}


@pytest.fixture
def adapter() -> HydraAdapter:
    return make_adapter(SHAPES, rank=4, heads=3, seed=1, dtype=torch.bfloat16, targets=("q_proj", "o_proj"))


@pytest.fixture
def stored(adapter: HydraAdapter, tmp_path: Path) -> StoredAdapter:
    return AdapterStore(tmp_path).add(adapter)


@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_what_is_read_is_what_was_stored(
    adapter: HydraAdapter, stored: StoredAdapter, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_PIECE", piece)
    monkeypatch.setattr(store, "_PAUSE_S", 0)
    again = read_stored(stored.path)
    assert again.digest == adapter.digest == stored.digest
    for path, weights in adapter.modules.items():
        assert again.modules[path].layout == weights.layout
        assert torch.equal(again.modules[path].a, weights.a)
        assert torch.equal(again.modules[path].b, weights.b)


def test_layouts_are_read_without_the_weights(adapter: HydraAdapter, stored: StoredAdapter, tmp_path: Path) -> None:
    expected = {path: weights.layout for path, weights in adapter.modules.items()}
    assert read_layouts(stored.path) == expected
    data = Path(stored.path).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    short = tmp_path / "short"
    short.write_bytes(data[:header])
    assert read_layouts(short) == expected
    for damaged in (data[:0], data[:5], data[:100], (1 << 60).to_bytes(8, "little") + data[8:]):
        short.write_bytes(damaged)
        with pytest.raises(UnreadableFileError):
            read_layouts(short)
    with pytest.raises(AdapterNotFoundError):
        read_layouts(tmp_path / "nothing")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:0],
        lambda data: data[:5],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
        lambda data: data.replace(b"BF16", b"I256"),
        lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,'),
    ],
    ids=["empty", "no header", "half a header", "a byte short", "a bit", "endless header", "dtype", "offset"],
)
def test_a_damaged_copy_is_refused(stored: StoredAdapter, damage: Callable[[bytes], bytes]) -> None:
    path = Path(stored.path)
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    with pytest.raises(UnreadableFileError, match="load the adapter again"):
        read_stored(path)


def test_a_missing_copy(stored: StoredAdapter) -> None:
    Path(stored.path).unlink()
    with pytest.raises(AdapterNotFoundError):
        read_stored(stored.path)
