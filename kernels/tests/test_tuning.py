"""Tuning tables: what is read, refused and found; the search; defaults for every shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import hydra_kernels.tuning as tuning
import pytest
import torch
from hydra_kernels.tuning import ExpandConfig, ShrinkConfig, table
from hydra_kernels.tuning.config import CHUNK_UNIT, MAX_CHUNKS, chunk_size, default_expand, default_shrink
from hydra_kernels.tuning.shapes import ADAPTERS, MODELS
from hydra_kernels.tuning.timing import Timer
from hydra_kernels.tuning.tune import Pair, search
from hydra_kernels.weights import Layout

SHRINK = ShrinkConfig(16, 4, 16, 128)
EXPAND = ExpandConfig(64, 32, 128, 4, 64, warps=8, registers=128, pdl=True)
ENTRIES = [
    table.entry("shrink", (4096, 24, 3), 64, SHRINK, pair_us=3.5),
    table.entry("shrink", (4096, 24, 3), 8, ShrinkConfig(16, 1, 32, 256)),
    table.entry("expand", (6144, 128, 3), 2048, EXPAND),
]


@pytest.fixture
def made_up_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A GPU whose tables are looked for in this folder."""
    caches = (table.load, tuning._shrink, tuning._expand)
    monkeypatch.setenv(table.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Made-Up GPU 9000 (80 GB)")
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def test_a_table_is_read_as_it_was_written() -> None:
    text = table.dump({"gpu": "X"}, ENTRIES)
    assert json.loads(text) == {"gpu": "X", "entries": ENTRIES}
    parsed = table.parse(text, "here")
    assert parsed.find("expand", (6144, 128, 3), 2048) == EXPAND
    assert list(table.entries_by_key(text, "here").values()) == ENTRIES


@pytest.mark.parametrize(("tokens", "measured_for"), [(1, 8), (8, 8), (9, 64), (64, 64), (5000, 64)])
def test_the_next_larger_number_of_tokens_counts(tokens: int, measured_for: int) -> None:
    found = table.parse(table.dump({}, ENTRIES), "here").find("shrink", (4096, 24, 3), tokens)
    assert found == {8: ShrinkConfig(16, 1, 32, 256), 64: SHRINK}[measured_for]


def test_the_kernels_use_the_table_of_their_gpu(made_up_gpu: Path) -> None:
    (made_up_gpu / "made_up_gpu_9000_80_gb.json").write_text(table.dump({}, ENTRIES))
    cuda = torch.device("cuda")
    assert tuning.shrink_config(cuda, torch.bfloat16, 33, 4096, 24, 3) == SHRINK
    assert tuning.expand_config(cuda, torch.float16, 2048, 6144, 128, 3, 1) == EXPAND
    defaults = default_shrink(64, 4096, 12, 3, 2), default_shrink(64, 4096, 24, 3, 4)
    assert tuning.shrink_config(cuda, torch.bfloat16, 33, 4096, 12, 3) == defaults[0], "a shape that was not measured"
    assert tuning.shrink_config(cuda, torch.float32, 33, 4096, 24, 3) == defaults[1], "no tensor cores"


@pytest.mark.usefixtures("made_up_gpu")
def test_without_a_table_there_are_defaults() -> None:
    found = tuning.expand_config(torch.device("cuda"), torch.bfloat16, 2000, 6144, 128, 3, 1)
    assert found == default_expand(2048, 6144, 128, 2, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "got no JSON object with a list 'entries'"),
        ("[]", "got no JSON object with a list 'entries'"),
        (table.dump({}, [ENTRIES[0] | {"op": "shift"}]), "entry 0 is not a configuration"),
        (table.dump({}, [ENTRIES[0], {"op": "expand"}]), "entry 1 is not a configuration"),
        (table.dump({}, [ENTRIES[0] | {"config": {"tile": 16}}]), "entry 0 is not a configuration"),
    ],
)
def test_what_is_no_table_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table.parse(text, "here")


@pytest.mark.parametrize(
    ("name", "value"), [("tile", 32), ("chunks", 2), ("block_rows", 64), ("block_in", 100), ("warps", 16)]
)
def test_shrink_keeps_to_what_changes_no_bit(name: str, value: int) -> None:
    fields = {"tile": 16, "chunks": 1, "block_rows": 16, "block_in": 64} | {name: value}
    with pytest.raises(ValueError, match=f"got {name} {value}"):
        ShrinkConfig(**fields)


@pytest.mark.parametrize(
    ("name", "value"), [("tile", 32), ("tokens", 64), ("block_out", 32), ("out_steps", 3), ("warps", 2)]
)
def test_expand_keeps_to_what_changes_no_bit(name: str, value: int) -> None:
    fields = {"tile": 16, "tokens": 16, "block_out": 64, "out_steps": 1, "block_k": 32} | {name: value}
    with pytest.raises(ValueError, match=f"got {name} {value}"):
        ExpandConfig(**fields)


@pytest.mark.parametrize("in_features", [1, 50, 512, 513, 4096, 11008, 14336, 28672, 100000])
def test_chunks_cover_in(in_features: int) -> None:
    chunk = chunk_size(in_features)
    assert chunk % CHUNK_UNIT == 0
    assert (MAX_CHUNKS - 1) * (chunk - CHUNK_UNIT) < in_features <= MAX_CHUNKS * chunk
    for chunks in (1, 4, 16):
        splits = ShrinkConfig(16, chunks, 16, 64).splits(in_features)
        assert (splits - 1) * chunks * chunk < in_features <= splits * chunks * chunk


SHAPES = [layer for layers in MODELS.values() for layer in layers]


def test_there_are_defaults_for_every_shape() -> None:
    """They are valid by being made; small batches are split so that they fill a GPU."""
    for layer in SHAPES:
        for layout in (*ADAPTERS.values(), Layout(64, 8, has_router=True)):
            for tokens in (1, 2, 16, 64, 512, 1024, 8192, 1 << 20):
                for itemsize in (2, 4):
                    slices = len(layer.out_slices)
                    shrink = default_shrink(tokens, layer.in_features, layout.z_rows, slices, itemsize)
                    default_expand(tokens, layer.out, layout.k, itemsize, shrink.splits(layer.in_features))
                    if tokens == 1 and layout in ADAPTERS.values():
                        assert shrink.splits(layer.in_features) >= 8


@pytest.mark.parametrize("tokens", [128, 256, 512, 1024, 2048, 8192])
def test_defaults_fill_a_gpu_and_read_little_twice(tokens: int) -> None:
    """For one adapter: programs, and the bytes of B and z that expand reads, against y read and written."""
    for layer, layout in product(SHAPES, ADAPTERS.values()):
        shrink = default_shrink(tokens, layer.in_features, layout.z_rows, len(layer.out_slices), 2)
        splits, y = shrink.splits(layer.in_features), 4 * tokens * layer.out
        expand = default_expand(tokens, layer.out, layout.k, 2, splits)
        assert splits * len(layer.out_slices) * tokens / shrink.tile >= 48
        blocks = tokens / expand.tokens
        assert 2 * layout.k * layer.out * blocks <= (2 if tokens < 2048 else 1) * y
        programs = blocks * layer.out / (64 * expand.out_steps)
        assert programs >= 512 or expand.out_steps == 1
        if tokens >= 512:
            assert 4 * layout.k * splits * expand.tokens * programs <= 4 * y, (
                "from the L1: five times as fast as the L2"
            )
        if expand.tokens == 64:
            assert splits == 1, "h of 64 tokens and the partial sums under way have to fit the registers"
        loads = expand.tokens * expand.block_k * splits / (32 * expand.warps)
        assert loads <= 64 or expand.warps == 8, "of u by a thread, in an unrolled loop over all partial sums"


def test_the_limit_on_registers_is_for_a_loop_over_k_with_one_partial_sum() -> None:
    """With two to four partial sums it takes up to 193 registers, with 16 tokens no more than 128."""
    for tokens, splits in product((16, 64, 128, 2048), (1, 2, 4, 8)):
        for k in (32, 128, 256, 512):
            expected = 160 if k > 128 and splits == 1 and tokens > 64 else 0
            assert default_expand(tokens, 4096, k, 2, splits).registers == expected


def test_the_search_finds_the_fastest_of_independent_sizes() -> None:
    """A made-up GPU on which each block size adds its own time."""
    seen: list[Pair] = []

    def measure(pairs: Sequence[Pair]) -> list[float]:
        seen.extend(pairs)
        return [
            abs(s.block_in - 128) + s.warps + s.stages + abs(s.chunks - 4) + e.block_out + (9 if e.pdl else 10)
            for s, e in pairs
        ]

    start = ShrinkConfig(16, 1, 16, 64), ExpandConfig(16, 16, 128, 1, 32)
    (shrink, expand), _ = search(start, {"shrink": True, "expand": True}, measure, pdl=True)
    assert (shrink.block_in, shrink.warps, shrink.stages, shrink.chunks) == (128, 2, 2, 4)
    assert (expand.block_out, expand.pdl) == (64, True)
    seen.clear()
    (shrink, expand), _ = search(start, {"shrink": False, "expand": True}, measure, pdl=False)
    assert shrink == start[0]
    assert not any(pair[1].pdl for pair in seen)


def test_calls_are_timed_in_turn() -> None:
    calls: list[str] = []
    times = Timer("cpu").medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4  # once to warm up
    assert set(times) == {"a", "b"}
    assert all(time > 0 for time in times.values())
