"""Step metadata: segments and tiles hold every token with a slot once, at addresses that never change."""

from __future__ import annotations

import numpy as np
import pytest
from hydra_kernels import StepMetadata, testing
from hydra_kernels.metadata import NUM_SEGMENTS, NUM_TILES, NUM_TOKENS, TILE_SIZES, max_tiles
from hypothesis import given
from hypothesis import strategies as st

SLOTS = 7
STEPS = st.lists(st.integers(-1, SLOTS - 1), max_size=200)


def tiles(meta: StepMetadata, size: int) -> np.ndarray:
    count = int(meta.host[NUM_TILES + TILE_SIZES.index(size)])
    return meta.part(f"tiles_{size}").numpy().reshape(-1, 3)[:count]


def check(meta: StepMetadata, ids: np.ndarray) -> None:
    """Everything that the class promises of a step."""
    with_slot = np.flatnonzero(ids >= 0)
    used = np.unique(ids[with_slot])
    assert int(meta.host[NUM_TOKENS]) == with_slot.size
    assert int(meta.host[NUM_SEGMENTS]) == used.size
    assert meta.active == bool(used.size)
    order = meta.part("order").numpy()[: with_slot.size]
    starts = meta.part("segment_start").numpy()[: used.size + 1]
    for i, slot in enumerate(used):
        assert meta.part("segment_slot")[i] == slot
        np.testing.assert_array_equal(order[starts[i] : starts[i + 1]], np.flatnonzero(ids == slot))
    for size in TILE_SIZES:
        covered = []
        for slot, start, count in tiles(meta, size):
            assert 1 <= count <= size
            assert set(ids[order[start : start + count]]) == {slot}
            covered += range(start, start + count)
        assert covered == list(range(with_slot.size))
        assert len(tiles(meta, size)) <= meta.max_tiles(size, ids.size)
    np.testing.assert_array_equal(meta.part("token_slot").numpy()[: ids.size], ids)
    assert (meta.part("token_slot").numpy()[ids.size :] == -1).all()


@given(st.lists(STEPS, min_size=1, max_size=3))
def test_any_steps_one_after_another(steps: list[list[int]]) -> None:
    """Nothing of an earlier, longer step shows in a later one."""
    meta = StepMetadata(200, SLOTS)
    address = meta.device.data_ptr()
    for step in steps:
        ids = np.array(step, dtype=np.int32)
        meta.update(ids)
        check(meta, ids)
    assert meta.device.data_ptr() == address


@pytest.mark.parametrize("mix", testing.MIXES)
def test_mixes_of_many_tokens(mix: str) -> None:
    ids = testing.token_slots(mix, 1000, 64)
    meta = StepMetadata(1000, 64)
    meta.update(ids)
    check(meta, ids)


@pytest.mark.parametrize("size", TILE_SIZES)
@pytest.mark.parametrize(("tokens", "slots"), [(1, 64), (64, 64), (65, 64), (300, 7), (8192, 64), (5, 1)])
def test_the_worst_mix_needs_just_as_many_tiles(size: int, tokens: int, slots: int) -> None:
    """A graph's launch has room for every mix, and no more than that."""
    segments = min(tokens, slots)
    ids = [*range(segments), *[0] * (tokens - segments)]  # one token for each slot, all others for the first
    meta = StepMetadata(tokens, slots)
    meta.update(ids)
    assert len(tiles(meta, size)) == max_tiles(size, tokens, slots) == meta.max_tiles(size)


def test_an_empty_step() -> None:
    meta = StepMetadata(4, 2)
    meta.update([0, 1])
    meta.update([])
    assert not meta.active
    assert meta.host[: len(meta.part("header"))].count_nonzero() == 0


def test_too_much_is_refused_and_changes_nothing() -> None:
    meta = StepMetadata(4, 2)
    meta.update([1, 0, 1])
    before = meta.host.clone()
    with pytest.raises(ValueError, match="got 5 tokens, expected at most 4"):
        meta.update([0] * 5)
    with pytest.raises(ValueError, match="got slot 2, expected at most 1"):
        meta.update([0, 2])
    assert meta.host.equal(before)
