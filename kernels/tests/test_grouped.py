"""The grouped torch path against the reference."""

from __future__ import annotations

import hydra_kernels as hk
import pytest
import torch
from hydra_kernels import reference, testing
from hydra_kernels.slots import StackedSlots

LAYOUTS = [
    hk.Layout(8, 4, has_router=True),
    hk.Layout(3, 1),
    hk.Layout(16, 3, has_router=True, has_bias=True),
    hk.Layout(4, 8, shared_a=False, top_k=2, has_router=True),
    hk.Layout(5, 2, top_k=1, renormalize=False, has_router=True),
    hk.Layout(2, 3),
]


OUT, IN, TOKENS = (40, 24, 24), 50, 37


def make(dtype: torch.dtype) -> tuple[StackedSlots, list[list[hk.HydraWeights | None]]]:
    """A merged layer whose slot i holds LAYOUTS[i], some of its slices not adapted."""
    slots = StackedSlots(len(LAYOUTS), IN, OUT, testing.capacity_for(LAYOUTS), dtype, "cpu")
    held: list[list[hk.HydraWeights | None]] = []
    for i, layout in enumerate(LAYOUTS):
        parts = [testing.random_weights(IN, out, layout, dtype, 10 * i + j) for j, out in enumerate(OUT)]
        held.append([None if (i + j) % 4 == 0 else part for j, part in enumerate(parts)])
        slots.load(i, held[-1])
    return slots, held


def rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) of a step."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, IN, generator=g).to(dtype), torch.randn(TOKENS, sum(OUT), generator=g).to(dtype)


@pytest.mark.parametrize("mix", testing.MIXES)
@pytest.mark.parametrize("dtype", testing.TOLERANCE, ids=str)
def test_linear_matches_reference(mix: str, dtype: torch.dtype) -> None:
    slots, held = make(dtype)
    ids = testing.token_slots(mix, TOKENS, len(LAYOUTS))
    meta = hk.StepMetadata(64, len(LAYOUTS))
    meta.update(ids)
    x, y = rows(dtype)
    expected = reference.linear(y, x, ids.tolist(), held, OUT, torch.float64)
    hk.linear_(y, x, slots, meta)
    assert testing.max_error(y, expected) < testing.TOLERANCE[dtype]


def test_shrink_then_expand_is_linear() -> None:
    slots, _ = make(torch.float32)
    meta = hk.StepMetadata(TOKENS, len(LAYOUTS))
    meta.update(testing.token_slots("partial", TOKENS, len(LAYOUTS)))
    x, y = rows(torch.float32)
    apart = y.clone()
    hk.linear_(y, x, slots, meta)
    z = hk.shrink(x, slots, meta)
    assert z[:, ::2].count_nonzero() == 0  # rows without a slot
    hk.expand_(apart, z, slots, meta)
    assert torch.equal(y, apart)


def test_what_an_earlier_adapter_left_is_not_read() -> None:
    """A slot's memory is not cleared when it is loaded again."""
    slots, held = make(torch.float32)
    for t in (slots.a, slots.b, slots.bias):
        testing.poison(t)
    for i, parts in enumerate(held):
        slots.load(i, parts)
    ids = testing.token_slots("distinct", TOKENS, len(LAYOUTS))
    meta = hk.StepMetadata(TOKENS, len(LAYOUTS))
    meta.update(ids)
    x, y = rows(torch.float32)
    expected = reference.linear(y, x, ids.tolist(), held, OUT, torch.float64)
    hk.linear_(y, x, slots, meta)
    assert testing.max_error(y, expected) < testing.TOLERANCE[torch.float32]


def test_a_cleared_slot_adds_nothing() -> None:
    slots, _ = make(torch.float32)
    meta = hk.StepMetadata(TOKENS, len(LAYOUTS))
    meta.update([2] * TOKENS)
    slots.clear(2)
    x, y = rows(torch.float32)
    before = y.clone()
    hk.linear_(y, x, slots, meta)
    assert torch.equal(y, before)
