"""The PEFT tuner: puts HydraLoRA layers into a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from hydraserve.tuner.config import HydraLoraConfig
from hydraserve.tuner.errors import MergeError
from hydraserve.tuner.layer import HydraLoraLayer, HydraLoraLinear
from hydraserve.tuner.losses import RouterLosses
from hydraserve.tuner.register import PREFIX


class HydraLoraModel(BaseTuner):
    """A model with HydraLoRA adapters; made by `get_peft_model` and `PeftModel.from_pretrained`.

    router_losses: shared by all layers, see `hydraserve.tuner.losses`.
    """

    prefix = PREFIX
    tuner_layer_cls = HydraLoraLayer
    target_module_mapping = cast(dict[str, list[str]], TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.router_losses = RouterLosses()
        self._mask_hook = model.register_forward_pre_hook(self._take_token_mask, with_kwargs=True)

    def _take_token_mask(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.router_losses.token_mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's place for `adapter_names`. Raises ValueError: without this, PEFT drops the argument in silence."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: got an adapter for each row, expected none: HydraLoRA's layers apply the active "
                "adapters to the whole batch; call set_adapter() between batches, or serve them with `hydraserve`"
            )
        yield

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; further warns of `num_heads_pattern` keys that match no module, as PEFT does for the ranks."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.router_losses.num_layers = sum(isinstance(m, HydraLoraLayer) for m in model.modules())
        pattern = cast(HydraLoraConfig, self.peft_config[adapter_name]).num_heads_pattern
        unmatched = [
            key for key in pattern if not any(re.match(rf"(.*\.)?({key})$", m) for m in self.targeted_module_names)
        ]
        if unmatched:
            warnings.warn(
                f"The following num_heads_pattern keys did not match any targeted module: {unmatched}", stacklevel=2
            )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(HydraLoraConfig, peft_config)
        if isinstance(target, HydraLoraLayer):
            target.update_layer(adapter_name, config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not is_linear(base):
            raise TypeError(
                f"{current_key}: got a {type(base).__name__}, expected a linear layer (torch.nn.Linear, Conv1D, or a "
                f"quantised one that PEFT knows); name only linear layers in target_modules"
            )
        layer = HydraLoraLinear(target, adapter_name, config, current_key, self.router_losses)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is trainable only once it is set active
        self._replace_module(parent, target_name, layer, target)

    def unload(self) -> nn.Module:
        """The base model without any adapter."""
        self._mask_hook.remove()
        base: nn.Module = super().unload()
        return base

    def _check_merge_allowed(self) -> None:
        raise MergeError.new()


def is_linear(layer: nn.Module) -> bool:
    """Whether the tuner can adapt this layer."""
    if isinstance(layer, (nn.Linear, Conv1D)):
        return True
    backend = resolve_quantization_backend(layer)
    return backend is not None and backend.layer_type == "linear"
