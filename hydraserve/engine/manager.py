"""vLLM's LoRA managers, taking HydraAdapters: which are in host memory, which in a slot."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from hydraserve.adapters.checkpoint import load_adapter
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.engine.layers import HydraLinear, ModuleWeights, slot_capacity
from hydraserve.engine.loader import HydraLoRAModel, to_lora_model
from hydraserve.engine.options import EngineOptions
from hydraserve.errors import AdapterNotFoundError, BaseMismatchError, LimitError


class HydraLoRAModelManager(LRUCacheLoRAModelManager):
    """Packs the parts of merged layers as HydraWeights; the rest is vLLM's."""

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        for wrapper in self.punica_wrapper_mapping.values():
            wrapper.native_layers = any(
                not isinstance(module, HydraLinear) and module.punica_wrapper is wrapper
                for module in self.modules.values()
            )

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        if not isinstance(lora_model, HydraLoRAModel):
            super()._create_merged_loras_inplace(lora_model)  # vLLM's warm-up adapters
            return
        for name, children in self.packed_modules.items():
            parts = [lora_model.loras.pop(child, None) for child in children]
            if any(parts):
                packed = [weights for part in parts for weights in (part.parts if part else [None])]
                lora_model.loras[name] = ModuleWeights(packed)

    def check(self, lora_model: HydraLoRAModel) -> None:
        """Raises BaseMismatchError when a module of the adapter is no adaptable layer of this model."""
        known = set(self.modules) | {child for children in self.packed_modules.values() for child in children}
        # Under pipeline parallelism a rank has only some of the layers: compare names without layer numbers.
        generic = {_without_numbers(name) for name in known}
        unknown = sorted(n for n in lora_model.loras if n not in known and _without_numbers(n) not in generic)
        if unknown:
            raise BaseMismatchError(
                what=f"adapter {lora_model.adapter.source}",
                got=f"weights for {unknown[0]}" + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""),
                expected=f"modules that this server wraps: {', '.join(sorted({n.split('.')[-1] for n in known}))}",
                fix="start the server with this adapter or with --target-modules, so that these modules are wrapped",
            )


def _without_numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


class HydraWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """Loads adapters through `hydraserve.adapters`, whatever their format."""

    _manager_cls = HydraLoRAModelManager
    _adapter_manager: HydraLoRAModelManager

    def __init__(self, vllm_config: VllmConfig, device: torch.device, embedding_modules: dict[str, str]) -> None:
        super().__init__(vllm_config, device, embedding_modules, lora_model_cls=HydraLoRAModel)
        self.options = EngineOptions.from_vllm_config(vllm_config)

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        with slot_capacity(self.options.capacity):
            return super().create_lora_manager(model, vllm_config)

    def _load_adapter(self, lora_request: LoRARequest) -> HydraLoRAModel:
        path = get_adapter_absolute_path(lora_request.lora_path)
        try:
            adapter = load_adapter(path)
        except AdapterNotFoundError as e:
            raise LoRAAdapterNotFoundError(lora_request.lora_name, lora_request.lora_path) from e
        self._check_capacity(adapter)
        mapper = getattr(self._adapter_manager.model, "hf_to_vllm_mapper", None)
        if mapper is not None:
            mapper = mapper.get_rename_mapper()
        lora = to_lora_model(adapter, lora_request.lora_int_id, self.lora_config.lora_dtype, mapper)
        self._adapter_manager.check(lora)
        return lora

    def _check_capacity(self, adapter: HydraAdapter) -> None:
        for name, weights in adapter.modules.items():
            try:
                self.options.capacity.check(weights)
            except ValueError as e:
                raise LimitError(
                    what=f"adapter {adapter.source}, module {name}",
                    got=f"rank {weights.layout.rank}, {weights.layout.heads} heads",
                    expected=str(e),
                    fix="start the server with larger --max-rank and --max-heads",
                ) from e
