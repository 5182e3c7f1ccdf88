"""LoRAMoE: HydraLoRA's ancestor, with one A for each head.

Source: Ablustrund/LoRAMoE (arXiv:2312.09979). For each adapted linear layer

    {module}.lora_route.weight [E, in]    {module}.lora_A{i}.weight [r, in]    {module}.lora_B{i}.weight [out, r]

and in adapter_config.json peft_type "LORA", r, lora_nums (E), lora_alpha; blc_alpha and blc_weight only matter in
training. w = softmax of the router in float32 over all heads, s = lora_alpha / r.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from hydraserve.adapters.config import AdapterConfig, PatternMatcher
from hydraserve.adapters.formats import lease
from hydraserve.adapters.formats.features import refuse_features
from hydraserve.adapters.formats.mixture import MixtureParts, mixture_plan, numbered, required
from hydraserve.adapters.formats.plan import ModulePlan, group
from hydraserve.adapters.formats.relatives import refuse_relatives
from hydraserve.adapters.tensors import TensorInfo

NAME = "loramoe"
TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>route|[AB](?:0|[1-9]\d{0,8}))\.weight")
OWN_A = re.compile(r".+\.lora_A\d+\.weight")


def recognise(config: AdapterConfig, names: Collection[str]) -> str | None:
    """Why this is LoRAMoE, or None."""
    if config.fields.get("peft_type") != "LORA" or lease.is_lease(config):
        return None
    if not any(OWN_A.fullmatch(name) for name in names):
        return None
    return "peft_type LORA, tensors lora_route and lora_A0, lora_A1, ...: one A for each head"


def plan(config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> dict[str, ModulePlan]:
    """Module path -> plan, in the order of the file.

    Raises AdapterError's subclasses for whatever does not fit together.
    """
    refuse_relatives(config, infos)
    refuse_features(config.fields)
    matcher = PatternMatcher(config.limits)
    rank = config.counts("r", "rank_pattern", config.limits.rank, matcher)
    heads = config.counts("lora_nums", "lora_nums_pattern", config.limits.heads, matcher)
    alpha = config.alphas(matcher)
    modules = group(infos, TENSOR)
    config.check_targets(modules, whole_components=False)
    return {
        path: mixture_plan(
            infos,
            loramoe_parts(path, parts, heads.of(path)),
            rank=rank.of(path),
            scaling=config.scaling(rank.of(path), alpha.of(path)),
        )
        for path, parts in modules.items()
    }


def loramoe_parts(path: str, parts: Mapping[str, str], heads: int) -> MixtureParts:
    """A module's tensors in this naming. Raises MissingTensorError or ShapeError."""
    return MixtureParts(
        a=numbered(path, parts, "A", heads, "lora_A{}.weight"),
        heads=numbered(path, parts, "B", heads, "lora_B{}.weight"),
        router=required(path, parts, "route", "lora_route.weight"),
    )
