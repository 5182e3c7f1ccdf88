"""Whether an adapter's modules have the sizes of the model's layers, before anything of it is in a slot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra_kernels import HydraWeights, Layout

from hydraserve.engine.layers import HydraLinear
from hydraserve.engine.loader import HydraLoRAModel
from hydraserve.engine.manager import HydraLoRAModelManager
from hydraserve.errors import BaseShapeError


class Layer(HydraLinear):
    """A layer of vLLM's, as far as its sizes go."""

    def __init__(self, **base: Any) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__["base_layer"] = SimpleNamespace(**base)


def weights(in_features: int, out_features: int) -> HydraWeights:
    return HydraWeights(a=torch.zeros(2, in_features), b=torch.zeros(1, out_features, 2), layout=Layout(2))


PLAIN = Layer(input_size=8, output_size=6)
MERGED = Layer(input_size=8, output_size=12, output_sizes=[6, 6])
# Four ranks share two heads of K and of V: counted twice each.
QKV = Layer(input_size=8, output_size=48, output_sizes=[16, 16, 16], num_kv_head_replicas=2)


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (PLAIN, [6]),
        (MERGED, [6, 6]),
        (MERGED, [6, None]),
        (MERGED, [None, 6]),
        (MERGED, [12]),
        (QKV, [16, 8, 8]),
        (QKV, [32]),
        (QKV, [24, 8]),
    ],
)
def test_weights_that_fit(layer: Layer, sizes: list[int | None]) -> None:
    layer.check([None if size is None else weights(8, size) for size in sizes])
    for wrong in (7, 9):
        with pytest.raises(ValueError, match=f"{wrong} inputs"):
            layer.check([None if size is None else weights(wrong, size) for size in sizes])


@pytest.mark.parametrize(
    ("layer", "sizes"), [(PLAIN, [5]), (PLAIN, [7]), (MERGED, [6, 7]), (MERGED, [13]), (QKV, [16, 16, 16])]
)
def test_weights_that_do_not(layer: Layer, sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="outputs for 8 and"):
        layer.check([weights(8, size) for size in sizes])


def test_content_for_another_base_is_refused_when_it_is_prepared() -> None:
    manager = object.__new__(HydraLoRAModelManager)
    manager.modules, manager.packed_modules = {"l.gate_up": MERGED, "l.down": PLAIN}, {"l.gate_up": ["l.gate", "l.up"]}

    def model(down: int) -> HydraLoRAModel:
        shapes = {"l.gate": 6, "l.up": 6, "l.down": down, "on.another.rank": 3}
        adapter: Any = SimpleNamespace(rank=2, source="/store/x")
        return HydraLoRAModel(1, adapter, {name: weights(8, out) for name, out in shapes.items()})

    manager.pack(model(6))
    with pytest.raises(BaseShapeError, match=r"l\.down: got weights of 8 inputs and 7 outputs for 8 and 6"):
        manager.pack(model(7))
