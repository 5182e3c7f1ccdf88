"""The grouped torch path against the reference."""

from __future__ import annotations

import pytest
import torch

import hydra_kernels as hk
from hydra_kernels import reference, testing

LAYOUTS = [
    hk.Layout(8, 4, has_router=True),
    hk.Layout(3, 1),
    hk.Layout(16, 3, has_router=True, has_bias=True),
    hk.Layout(4, 8, shared_a=False, top_k=2, has_router=True),
    hk.Layout(5, 2, top_k=1, renormalize=False, has_router=True),
    hk.Layout(2, 3),
]


@pytest.mark.parametrize("mix", testing.MIXES)
@pytest.mark.parametrize("dtype", testing.TOLERANCE, ids=str)
def test_linear_matches_reference(mix: str, dtype: torch.dtype) -> None:
    out, n_in, tokens = (40, 24, 24), 50, 37
    slots = hk.make_slots(len(LAYOUTS), n_in, out, testing.capacity_for(LAYOUTS), dtype, "cpu")
    held = []
    for i, layout in enumerate(LAYOUTS):
        parts = [testing.random_weights(n_in, o, layout, dtype, 10 * i + j) for j, o in enumerate(out)]
        held.append([None if (i + j) % 4 == 0 else p for j, p in enumerate(parts)])
        slots.load(i, held[-1])
    ids = testing.token_slots(mix, tokens, len(LAYOUTS))
    meta = hk.StepMetadata(64, len(LAYOUTS))
    meta.update(ids)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, n_in, generator=g).to(dtype)
    y = torch.randn(tokens, sum(out), generator=g).to(dtype)
    expected = reference.linear(y, x, ids.tolist(), held, out, torch.float64)
    hk.linear_(y, x, slots, meta)
    assert testing.max_error(y, expected) < testing.TOLERANCE[dtype]
