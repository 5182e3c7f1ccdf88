"""Relatives of HydraLoRA that use similar names for other mathematics: recognised, so that none is misread.

Each is refused by name. The patterns are searched in the names of the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hydraserve.adapters.config import AdapterConfig
from hydraserve.errors import UnsupportedFeatureError


@dataclass(frozen=True, slots=True)
class Relative:
    """title: the method. difference: what it computes otherwise. tensors: a pattern that only its names match."""

    title: str
    difference: str
    tensors: re.Pattern[str]


def _relative(title: str, difference: str, tensors: str) -> Relative:
    return Relative(title, difference, re.compile(tensors))


# The first that matches names the method; more special patterns come first.
RELATIVES = (
    _relative("mtLoRA with block adapters", "adapters around whole blocks", r"\.block_adapter\."),
    _relative("MMOE-LoRA", "a gate from a task embedding", r"\.lora[AB]\.\d+\.mlp\.weight$"),
    _relative("MLLM-HydraLoRA", "one biased router for gate, up and down", r"\.shared_LoRA_A_|\.LoRA_B$"),
    _relative("MoE-PEFT (LoRAMoE, MoLA, MixLoRA)", "one A for each expert", r"\.moe_gate\."),
    _relative("HydraLoRA with hydra.router", "one A for each expert, a bias", r"\.hydra\.(?:lora_[AB]|router)\."),
    _relative("hierarchical HydraLoRA", "two levels of routing", r"\.lora_(?:A|B|route)\.expert_\d+\."),
    _relative("noisy top-k HydraLoRA", "one top-k choice for a whole sequence", r"\.lora_Bs\.\d+\.|\.w_noise\."),
    _relative("LoRAMoE or HydraFed-LEASE", "one A for each expert", r"\.lora_A\d+\."),
    _relative("the PEFT-style HYDRALORA fork", "lora_B.0, other ways of routing", r"\.lora_B\.\d+(?:\.|$)"),
    _relative("HydraLoRA with a router bias", "a bias added to the router's logits", r"\.lora_route\.bias$"),
    _relative("HydraLoRA with transposed, stacked tensors", "lora_B [E, r, out]", r"\.lora_[AB]$|\.lora_router\."),
    _relative("HMoRA", "a router shared between projections", r"\.mora_[ab]"),
    _relative("CuMA", "a router shared between projections", r"\.lora_[ab](?:\.|$)"),
    _relative("HydraLoRA for image models", "one gate for a whole sample", r"\.lora_(?:down$|up$|up_weight$)"),
)

# Fields of the configuration that, when set, change the routing.
ROUTING_FIELDS = {
    "top_k": "top-k routing",
    "topk": "top-k routing",
    "k": "top-k routing",
    "adaptive": "HydraFed-LEASE's adaptive routing",
    "shared_lora_a": "HydraFed-LEASE's tied A",
    "enable_fine_grained_routing": "mtLoRA's fine-grained routing",
    "enable_block_adapter": "mtLoRA's block adapters",
}

# Files beside the adapter's own that hold more trained weights.
_COMPANIONS = {
    "non_lora_trainables.bin": "weights trained outside the adapter (LLaVA, MLLM-HydraLoRA)",
    "moe_args.pth": "the routing of MLLM-HydraLoRA",
}

# peft_type, in lower case, of methods whose tensors' names may not tell them.
PEFT_TYPES = {
    "hydralora": "a HYDRALORA method of a PEFT fork",
    "loramoe": "LoRAMoE",
    "mola": "MoLA",
    "mixlora": "MixLoRA",
    "cuma": "CuMA",
}


def refuse_companions(folder: Path) -> None:
    """Raises UnsupportedFeatureError when the adapter's own file is only a part of what was trained."""
    for name, content in _COMPANIONS.items():
        if (folder / name).exists():
            raise UnsupportedFeatureError(
                name, got=content, expected="all trained weights in the adapter's file", fix="none: not supported"
            )


def refuse_relatives(config: AdapterConfig, names: Collection[str]) -> None:
    """Raises UnsupportedFeatureError for a method that is recognised but not supported."""
    for relative in RELATIVES:
        name = next((name for name in names if relative.tensors.search(name)), None)
        if name is not None:
            raise UnsupportedFeatureError(
                name,
                got=f"a tensor of {relative.title} ({relative.difference})",
                expected="HydraLoRA in the authors' layout (lora_A, lora_route, lora_B0, ...) or LoRA as PEFT saves it",
                fix="convert the adapter, if its mathematics is the same",
            )
    if method := PEFT_TYPES.get(config.peft_type.lower()):
        raise UnsupportedFeatureError(
            "peft_type", got=f"{config.peft_type!r}: {method}", expected="'LORA'", fix="none: not supported"
        )
    for field, feature in ROUTING_FIELDS.items():
        if config.fields.get(field):
            raise UnsupportedFeatureError(
                field,
                got=f"{config.fields[field]!r}: {feature}",
                expected="no such field",
                fix="none: not supported",
            )
