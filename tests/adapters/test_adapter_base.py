"""Does an adapter fit a base model: every module there, in the same size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_folders import MODULES, write

from hydraserve.adapters.checkpoint import check_base, inspect_adapter, load_adapter
from hydraserve.errors import BaseMismatchError, BaseShapeError

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
