"""LoRAMoE and MoLA as MoE-PEFT writes them: one A for each head, a router without bias for each module.

Source: TUDB-Labs/MoE-PEFT (adapters loramoe and mola). P is "loramoe" or "mola"; for each adapted linear layer

    P.layers.{n}.{block}.{projection}.moe_gate.weight [E, in]
    P.layers.{n}.{block}.{projection}.experts.{i}.lora_A.weight [r, in]      .lora_B.weight [out, r]

or, where a layer has no router (LoRAMoE's attention), ordinary LoRA: lora_A.weight and lora_B.weight. In
adapter_config.json peft_type "LORAMOE" or "MOLA", r, lora_alpha, use_rslora, num_experts (E), and for MoLA top_k.
The softmax is in float32; LoRAMoE uses all heads, MoLA the top_k largest, scaled to sum to one.

MixLoRA, of the same project, mixes whole feed-forward blocks and is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from hydraserve.adapters.config import AdapterConfig, PatternMatcher
from hydraserve.adapters.formats import lora
from hydraserve.adapters.formats.features import refuse_features
from hydraserve.adapters.formats.mixture import MixtureParts, mixture_plan, numbered, required
from hydraserve.adapters.formats.plan import ModulePlan, group
from hydraserve.adapters.tensors import TensorInfo

NAME = "moe-peft"
_PREFIXES = {"LORAMOE": "loramoe", "MOLA": "mola"}
_DEFAULT_TOP_K = 2  # MoE-PEFT's, where the field is missing
_TENSOR = re.compile(
    r"(?:loramoe|mola)\.(?P<module>layers\.\d+\.\w+\.\w+)\."
    r"(?P<part>moe_gate|experts\.(?:0|[1-9]\d{0,8})\.lora_[AB]|lora_[AB])\.weight"
)


def recognise(config: AdapterConfig, names: Collection[str]) -> str | None:
    """Why this is one of MoE-PEFT's mixtures, or None."""
    kind = config.fields.get("peft_type")
    prefix = _PREFIXES.get(kind) if isinstance(kind, str) else None
    if prefix is None or not any(name.startswith(f"{prefix}.layers.") for name in names):
        return None
    return f"peft_type {kind}, tensors {prefix}.layers.*.moe_gate and .experts.*.lora_A, .lora_B"


def plan(config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> dict[str, ModulePlan]:
    """Module path -> plan, in the order of the file.

    Raises AdapterError's subclasses for whatever does not fit together.
    """
    refuse_features(config.fields)
    matcher = PatternMatcher(config.limits)
    ranks = config.counts("r", "rank_pattern", config.limits.rank, matcher)
    heads = config.counts("num_experts", "num_experts_pattern", config.limits.heads, matcher)
    alphas = config.alphas(matcher)
    top_k = config.whole("top_k", _DEFAULT_TOP_K) if config.peft_type == "MOLA" else 0
    modules = {f"model.{path}": parts for path, parts in group(infos, _TENSOR).items()}
    config.check_targets(modules, whole_components=True)
    plans = {}
    for path, parts in modules.items():
        rank = ranks.of(path)
        scaling = config.scaling(rank, alphas.of(path))
        if set(parts) <= {"lora_A", "lora_B"}:
            plans[path] = lora.plan_module(infos, path, parts, rank, scaling)
        else:
            found = _parts(path, parts, heads.of(path))
            plans[path] = mixture_plan(infos, found, rank=rank, scaling=scaling, top_k=top_k)
    return plans


def _parts(path: str, parts: Mapping[str, str], heads: int) -> MixtureParts:
    return MixtureParts(
        a=_experts(path, parts, "A", heads),
        heads=_experts(path, parts, "B", heads),
        router=required(path, parts, "moe_gate", "moe_gate.weight"),
    )


def _experts(path: str, parts: Mapping[str, str], matrix: str, heads: int) -> tuple[str, ...]:
    suffix = f".lora_{matrix}"
    by_number = {part.removesuffix(suffix): name for part, name in parts.items() if part.endswith(suffix)}
    return numbered(path, by_number or parts, "experts.", heads, f"experts.{{}}.lora_{matrix}.weight")
