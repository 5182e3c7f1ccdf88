"""HydraLoRA as a fork of PEFT writes it: a tuner `hydralora` whose heads are a list.

For each adapted linear layer, in the flat form (without `use_hydralora_experts`),

    {module}.lora_A.weight [r, in]    {module}.lora_B.{i}.weight [out, r]    {module}.lora_route.weight [E, in]

and in adapter_config.json peft_type "HYDRALORA", r, lora_num (E), lora_alpha, and head_top_k: with it, the softmax is
over the k largest logits. s = lora_alpha / r. Its routing by a language that each sequence is marked with, and its
hierarchical form (experts above the heads), are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from hydraserve.adapters.config import AdapterConfig, PatternMatcher
from hydraserve.adapters.formats.features import refuse_features
from hydraserve.adapters.formats.mixture import MixtureParts, mixture_plan, numbered, required
from hydraserve.adapters.formats.plan import ModulePlan, group
from hydraserve.adapters.formats.relatives import refuse_relatives
from hydraserve.adapters.tensors import TensorInfo
from hydraserve.errors import UnsupportedFeatureError

NAME = "hydralora-list"
PEFT_TYPE = "HYDRALORA"
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>route|A|B\.(?:0|[1-9]\d{0,8}))\.weight")
_HEAD = re.compile(r".+\.lora_B\.\d+\.weight")
_TOP_K_FIELDS = ("head_top_k", "hydralora_head_top_k")

# Fields that change the routing, and the values with which they do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "use_hydralora_experts": (None, False),
    "expert_lora_nums": (None,),
    "language_router_mode": (None, "learned"),
    "language_head_router_mode": (None, "learned"),
    "language_bias_value": (None, 0, 0.0),
    "language_head_bias_value": (None, 0, 0.0),
    "use_rslora": (None, False),
}


def recognise(config: AdapterConfig, names: Collection[str]) -> str | None:
    """Why this is the fork's flat form, or None."""
    if config.fields.get("peft_type") != PEFT_TYPE or not any(_HEAD.fullmatch(name) for name in names):
        return None
    return f"peft_type {PEFT_TYPE}, tensors lora_A, lora_route and lora_B.0, lora_B.1, ..."


def plan(config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> dict[str, ModulePlan]:
    """Module path -> plan, in the order of the file.

    Raises AdapterError's subclasses for whatever does not fit together.
    """
    for field, neutral in _NEUTRAL.items():
        value = config.fields.get(field)
        if value not in neutral:
            raise UnsupportedFeatureError(
                field,
                got=f"{value!r}: a way of routing or scaling that the flat form does not have",
                expected=" or ".join(repr(n) for n in neutral),
                fix="none: not supported",
            )
    # top_k and num_experts are those of the hierarchical form, and mean nothing here.
    refuse_relatives(config, infos, reads=("top_k",))
    refuse_features(config.fields)
    matcher = PatternMatcher(config.limits)
    ranks = config.counts("r", "rank_pattern", config.limits.rank, matcher)
    heads = config.counts("lora_num", "lora_num_pattern", config.limits.heads, matcher)
    alphas = config.alphas(matcher)
    top_k = next((k for field in _TOP_K_FIELDS if (k := config.whole(field))), 0)
    modules = group(infos, _TENSOR)
    config.check_targets(modules, whole_components=True)
    return {
        path: mixture_plan(
            infos,
            _parts(path, parts, heads.of(path)),
            rank=ranks.of(path),
            scaling=alphas.of(path) / ranks.of(path),
            top_k=top_k,
        )
        for path, parts in modules.items()
    }


def _parts(path: str, parts: Mapping[str, str], heads: int) -> MixtureParts:
    return MixtureParts(
        a=(required(path, parts, "A", "lora_A.weight"),),
        heads=numbered(path, parts, "B.", heads, "lora_B.{}.weight"),
        router=required(path, parts, "route", "lora_route.weight"),
    )
