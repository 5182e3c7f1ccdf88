"""Relatives of HydraLoRA whose mathematics the gate cannot carry: recognised, so that none is misread.

Each is refused by name. The patterns are searched in the names of the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hydraserve.adapters.config import AdapterConfig
from hydraserve.adapters.locate import ARGUMENTS_NAMES, OTHER_WEIGHTS_NAME
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
    _relative("MixLoRA", "whole feed-forward blocks are mixed, after their activations", r"^mixlora\."),
    _relative("HydraLoRA with hydra.router", "clamped router logits", r"\.hydra\.(?:lora_[AB]|router)\."),
    _relative("hierarchical HydraLoRA", "two levels of routing", r"\.lora_(?:A|B|route)\.expert_\d+\."),
    _relative("noisy top-k HydraLoRA", "one top-k choice for a whole sequence", r"\.lora_Bs\.\d+\.|\.w_noise\."),
    _relative("HMoRA", "a router that is no single matrix", r"\.mora_[ab]"),
    _relative("CuMA", "a router that is no single matrix", r"\.lora_[ab](?:\.|$)"),
    _relative("HydraLoRA for image models", "one gate for a whole sample", r"\.lora_(?:down$|up$|up_weight$)"),
    _relative("HydraLoRA without a router", "weights of the heads for each sample", r"\.lora_B\.\d+(?:\.|$)"),
)
_HAS_ROUTER = re.compile(r"\.lora_route\.")

# Fields of the configuration that, when set, change the routing.
ROUTING_FIELDS = {
    "top_k": "top-k routing",
    "topk": "top-k routing",
    "k": "top-k routing",
    "adaptive": "HydraFed-LEASE's adaptive routing",
    "universal_idx": "HydraFed-LEASE's universal head",
    "shared_lora_a": "HydraFed-LEASE's tied A",
    "enable_fine_grained_routing": "mtLoRA's fine-grained routing: other weights for each group of outputs",
    "enable_block_adapter": "mtLoRA's block adapters",
}

# Files beside the adapter's own that hold more of what was trained, where `mllm` found nothing to serve in them.
_COMPANIONS = {
    OTHER_WEIGHTS_NAME: "weights trained outside the adapter (a LLaVA's projector)",
    ARGUMENTS_NAMES[1]: f"the routing of MLLM-HydraLoRA, without its weights ({OTHER_WEIGHTS_NAME})",
}

# peft_type, in lower case, of methods whose tensors' names may not tell them.
PEFT_TYPES = {
    "hydralora": "HydraLoRA by a PEFT fork, with other tensors than are known",
    "loramoe": "LoRAMoE, with other tensors than MoE-PEFT's",
    "mola": "MoLA, with other tensors than MoE-PEFT's",
    "mixlora": "MixLoRA: whole feed-forward blocks are mixed, after their activations",
    "cuma": "CuMA",
}


def refuse_companions(folder: Path) -> None:
    """Raises UnsupportedFeatureError when the adapter's own file is only a part of what was trained."""
    for name, content in _COMPANIONS.items():
        if (folder / name).exists():
            raise UnsupportedFeatureError(
                name, got=content, expected="all trained weights in the adapter's file", fix="none: not supported"
            )


def refuse_relatives(config: AdapterConfig, names: Collection[str], reads: Collection[str] = ()) -> None:
    """Raises UnsupportedFeatureError for a method that is recognised but not supported.

    reads: the routing fields of the configuration that the calling format follows itself.
    """
    refuse_by_tensors(names)
    for field, feature in ROUTING_FIELDS.items():
        if config.fields.get(field) and field not in reads:
            raise UnsupportedFeatureError(
                field,
                got=f"{config.fields[field]!r}: {feature}",
                expected="no such field",
                fix="none: not supported",
            )


def refuse_by_tensors(names: Collection[str]) -> None:
    """Raises UnsupportedFeatureError for tensors of a method that is recognised but not supported."""
    routed = any(_HAS_ROUTER.search(name) for name in names)
    for relative in RELATIVES:
        name = next((name for name in names if relative.tensors.search(name)), None)
        if name is not None and not (routed and relative is RELATIVES[-1]):
            raise UnsupportedFeatureError(
                name,
                got=f"a tensor of {relative.title} ({relative.difference})",
                expected="a format that docs/formats.md lists",
                fix="convert the adapter, if its mathematics is the same",
            )


def refuse_unrecognised(config: AdapterConfig, names: Collection[str]) -> None:
    """What no format recognised: raises UnsupportedFeatureError when it is a known method all the same."""
    refuse_relatives(config, names)
    if method := PEFT_TYPES.get(config.peft_type.lower()):
        raise UnsupportedFeatureError(
            "peft_type", got=f"{config.peft_type!r}: {method}", expected="'LORA'", fix="none: not supported"
        )
