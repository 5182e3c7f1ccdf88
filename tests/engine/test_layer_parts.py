"""Adapters of fused projections: one part for several slices of a layer is cut where the slices are."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hydra_kernels import HydraWeights, Layout
from hydra_kernels.testing import random_weights

from hydraserve.engine.layers import HydraLinear

SIZES = [4, 6, 2, 8]


def cut(*parts: HydraWeights | None) -> list[HydraWeights | None]:
    layer = SimpleNamespace(output_sizes=SIZES, output_slices=tuple(SIZES), n_slices=len(SIZES))
    return HydraLinear._split_parts(layer, list(parts))  # type: ignore[arg-type]


def weights(out: int, seed: int = 0) -> HydraWeights:
    return random_weights(16, out, Layout(3, 2, has_router=True), torch.float32, seed)


def test_one_part_for_all_slices() -> None:
    whole = weights(sum(SIZES))
    found = cut(whole)
    assert [part.out_features for part in found if part] == SIZES
    assert torch.equal(torch.cat([part.b for part in found if part], dim=1), whole.b)
    assert all(part.a is whole.a or torch.equal(part.a, whole.a) for part in found if part)
    assert all(part.router is not None and torch.equal(part.router, whole.router) for part in found if part)  # type: ignore[arg-type]


def test_parts_of_several_slices_each() -> None:
    first, second = weights(12, 1), weights(8, 2)
    found = cut(first, second)
    assert [part.out_features for part in found if part] == SIZES
    assert torch.equal(torch.cat([part.b for part in found[:3] if part], dim=1), first.b)
    assert found[3] is not None
    assert torch.equal(found[3].b, second.b)


def test_a_part_that_is_not_adapted() -> None:
    found = cut(weights(12), None)
    assert [part is None for part in found] == [False, False, False, True]


def test_a_part_for_each_slice_stays_as_it_is() -> None:
    parts = [weights(size, seed) for seed, size in enumerate(SIZES)]
    assert all(found is part for found, part in zip(cut(*parts), parts, strict=True))
