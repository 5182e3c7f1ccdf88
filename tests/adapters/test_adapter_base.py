"""Does an adapter fit a base model and its engine: every module there, in the same size, every number a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import MODULES, write
from hydra_kernels import Layout, SlotCapacity
from hydra_kernels.testing import random_weights

from hydraserve.adapters.checkpoint import check_base, inspect_adapter, load_adapter
from hydraserve.adapters.requirements import Requirements
from hydraserve.adapters.validate import check_range
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import BaseMismatchError, BaseShapeError, NonFiniteError

Q = "model.layers.2.self_attn.q_proj"
READERS = pytest.mark.parametrize("read", [load_adapter, inspect_adapter])


@READERS
def test_a_base_with_more_modules_fits(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    check_base(read(write(tmp_path)), {**MODULES, "model.layers.5.mlp.up_proj": (1, 1), "lm_head": (12, 100)})


@READERS
def test_modules_that_the_base_does_not_have(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    base = {path: shape for path, shape in MODULES.items() if "mlp.gate_proj" not in path}
    with pytest.raises(BaseMismatchError) as caught:
        check_base(read(write(tmp_path)), base)
    assert not isinstance(caught.value, BaseShapeError)
    assert "module model.layers.0.mlp.gate_proj: got weights for it (and 1 more such modules)" in str(caught.value)
    assert "trained on org/base" in str(caught.value)


@READERS
def test_a_layer_beyond_the_bases_last(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    base = {path.replace("layers.10.", "layers.1."): shape for path, shape in MODULES.items()}
    with pytest.raises(
        BaseMismatchError, match=r"layers\.10\.mlp\.gate_proj.*such as model\.layers\.0\.mlp\.gate_proj"
    ):
        check_base(read(write(tmp_path)), base)


@READERS
@pytest.mark.parametrize("shape", [(12, 13), (13, 12)], ids=str)
def test_a_module_of_another_size(tmp_path: Path, read: Callable[[Path], Any], shape: tuple[int, int]) -> None:
    with pytest.raises(BaseShapeError) as caught:
        check_base(read(write(tmp_path)), {**MODULES, Q: shape})
    assert f"module {Q}: got weights for 12 inputs and 12 outputs" in str(caught.value)
    assert f"expected {shape[0]} inputs and {shape[1]} outputs" in str(caught.value)


@pytest.mark.parametrize("part", ["a", "b", "router", "scaling"])
def test_numbers_that_the_engines_type_does_not_hold_are_refused(part: str) -> None:
    weights = random_weights(8, 8, Layout(2, 3, has_router=True), torch.float32)
    large = 70_000.0 if part == "scaling" else torch.full_like(getattr(weights, part), -70_000.0)
    adapter = HydraAdapter.of({"q_proj": replace(weights, **{part: large})})
    check_range(adapter, torch.bfloat16)
    with pytest.raises(NonFiniteError, match=r"at most 65504.*float16"):
        check_range(adapter, torch.float16)
    requirements = Requirements({"q_proj": (8, 8)}, SlotCapacity(rows=8, k=8, heads=4), ("q_proj",), torch.float16)
    with pytest.raises(NonFiniteError, match="--dtype bfloat16"):
        requirements.check(adapter)


@pytest.mark.parametrize("scaling", [1e300, float("inf"), float("nan")])
def test_a_scaling_beyond_all_numbers_is_refused(scaling: float) -> None:
    with pytest.raises(NonFiniteError, match="scaling of q_proj"):
        HydraAdapter.of({"q_proj": replace(random_weights(8, 8, Layout(2), torch.float32), scaling=scaling)})
