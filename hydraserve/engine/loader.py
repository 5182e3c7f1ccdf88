"""HydraAdapter -> what vLLM's LoRA manager holds."""

from __future__ import annotations

from typing import Any

import torch
from hydra_kernels import HydraWeights
from vllm.lora.lora_model import LoRAModel

from hydraserve.adapters.weights import HydraAdapter
from hydraserve.engine.layers import ModuleWeights
from hydraserve.errors import BaseMismatchError


class HydraLoRAModel(LoRAModel):
    """One adapter in host memory: module name -> ModuleWeights. nbytes: of the weights in the engine's dtype."""

    def __init__(self, lora_model_id: int, adapter: HydraAdapter, modules: dict[str, HydraWeights]) -> None:
        super().__init__(lora_model_id, adapter.rank, {})
        self.source = adapter.source
        self.nbytes = sum(weights.nbytes for weights in modules.values())
        self.loras: dict[str, Any] = {name: ModuleWeights([weights]) for name, weights in modules.items()}


def to_lora_model(
    adapter: HydraAdapter, lora_model_id: int, dtype: torch.dtype, weights_mapper: Any = None
) -> HydraLoRAModel:
    """The adapter under vLLM's module names, in the engine's dtype.

    weights_mapper: the model's renames from checkpoint names to its own (vllm WeightsMapper), or None.
    """
    modules = {_engine_name(name, weights_mapper): weights.to(dtype) for name, weights in adapter.modules.items()}
    return HydraLoRAModel(lora_model_id, adapter, modules)


def _engine_name(name: str, weights_mapper: Any) -> str:
    if weights_mapper is None:
        return name
    mapped = weights_mapper._map_name(f"{name}.weight")
    if mapped is None:
        raise BaseMismatchError(
            what=f"adapter module {name}",
            got="a module that this base model drops",
            expected="a linear layer of the base model",
            fix="use an adapter trained for this base model",
        )
    return str(mapped).removesuffix(".weight")
