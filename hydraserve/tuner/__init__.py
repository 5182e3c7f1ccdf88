"""HydraLoRA as a PEFT method: importing this package registers it.

    from hydraserve.tuner import HydraLoraConfig
    model = get_peft_model(base, HydraLoraConfig(r=8, num_heads=4, lora_alpha=32, target_modules="all-linear"))

`PeftModel.from_pretrained` finds the method by its name in adapter_config.json, so a program that only loads
adapters imports this package too. See docs/tuner.md.
"""

from __future__ import annotations

from hydraserve.tuner.config import HydraLoraConfig
from hydraserve.tuner.layer import HydraLoraLayer, HydraLoraLinear
from hydraserve.tuner.losses import RouterLossCallback
from hydraserve.tuner.model import HydraLoraModel
from hydraserve.tuner.register import register as _register
from hydraserve.tuner.routing import Routing, record_routing

__all__ = [
    "HydraLoraConfig",
    "HydraLoraLayer",
    "HydraLoraLinear",
    "HydraLoraModel",
    "RouterLossCallback",
    "Routing",
    "record_routing",
]

_register(HydraLoraConfig, HydraLoraModel)
