"""What is said of an adapter's weights: sizes, likeness of heads, faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hydra_kernels import HydraWeights, Layout
from hydra_kernels.testing import random_weights

from hydraserve.adapters.weights import HydraAdapter
from hydraserve.training.inspection import head_products, inspect_weights

HYDRA = Layout(rank=4, heads=3, has_router=True)


def adapter(**changes: torch.Tensor) -> HydraAdapter:
    """Two modules; the changes go into the second."""
    modules = {f"model.layers.{i}.mlp.up_proj": random_weights(40, 24, HYDRA, torch.float32, seed=i) for i in (0, 10)}
    modules["model.layers.10.mlp.up_proj"] = replace(modules["model.layers.10.mlp.up_proj"], **changes)
    return HydraAdapter.of(modules, base_model="someone/base")


@pytest.mark.parametrize("layout", [HYDRA, Layout(rank=2, heads=4, shared_a=False, has_router=True), Layout(rank=3)])
def test_head_products_are_those_of_the_full_matrices(layout: Layout) -> None:
    weights = random_weights(40, 24, layout, torch.float32)
    a = weights.a if layout.shared_a else weights.a.view(layout.heads, layout.rank, 40)
    full = (weights.scaling * weights.b @ a).flatten(1)
    torch.testing.assert_close(head_products(weights), full @ full.T)


def test_report_of_a_healthy_adapter() -> None:
    report = inspect_weights(adapter())
    assert [m.module for m in report.modules] == ["model.layers.0.mlp.up_proj", "model.layers.10.mlp.up_proj"]
    module = report.modules[0]
    parameters = 4 * 40 + 3 * 24 * 4 + 3 * 40
    assert (module.rank, module.heads, module.parameters, module.nbytes) == (4, 3, parameters, 4 * parameters)
    assert report.parameters == 2 * parameters
    assert abs(module.similarity) < 0.3
    assert report.warnings == ()
    weights: HydraWeights = adapter().modules[module.module]
    assert module.router_norm == pytest.approx(weights.router.norm().item())
    assert module.head_norms[1] == pytest.approx((2.0 * weights.b[1] @ weights.a).norm().item())


def test_copies_and_collapsed_heads_are_named() -> None:
    b = random_weights(40, 24, HYDRA, torch.float32, seed=7).b
    copied = inspect_weights(adapter(b=torch.stack([b[0], b[1], b[0] * 1.2])))
    assert copied.modules[1].copies == ((0, 2),)
    assert any("copies" in w and "model.layers.10.mlp.up_proj 0 and 2" in w for w in copied.warnings)
    starved = inspect_weights(adapter(b=torch.stack([b[0], b[1] * 1e-3, b[2]])))
    assert starved.modules[1].collapsed == (1,)
    assert any("collapsed" in w and "1 of 2 modules" in w for w in starved.warnings)


def test_untrained_adapter_and_flat_router() -> None:
    untrained = inspect_weights(adapter(b=torch.zeros(3, 24, 4)))
    assert untrained.warnings == ("every B is zero, so nothing is added: 1 of 2 modules, first " + PATH,)
    flat = inspect_weights(adapter(router=torch.ones(3, 40)))
    assert flat.modules[1].router_spread == 0
    assert flat.warnings == ("the router gives every head the same weight: 1 of 2 modules, first " + PATH,)


PATH = "model.layers.10.mlp.up_proj"


def test_plain_lora_has_no_likeness_and_no_router() -> None:
    lora = HydraAdapter.of({"q_proj": random_weights(8, 8, Layout(rank=2), torch.float32)})
    (module,) = inspect_weights(lora).modules
    assert (module.similarity, module.router_norm, module.router_spread, module.copies) == (None, None, None, ())
