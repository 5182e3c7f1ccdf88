"""HydraLoRA with transposed and stacked parameters: lora_A [in, r] and lora_B [E, r, out].

For each adapted linear layer

    {module}.lora_A [in, r]    {module}.lora_B [E, r, out]    {module}.lora_router.weight [E, in]    .bias [E] or none

and in adapter_config.json r, expert_num (E), lora_alpha; routing_strategy, if given, must be "soft": a softmax over
all heads. s = lora_alpha / r.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from hydra_kernels import Layout

from hydraserve.adapters.config import AdapterConfig, PatternMatcher
from hydraserve.adapters.formats.features import refuse_features
from hydraserve.adapters.formats.mixture import expect, required
from hydraserve.adapters.formats.plan import ModulePlan, StackedPlan, group, matrix, widest
from hydraserve.adapters.formats.relatives import refuse_relatives
from hydraserve.adapters.tensors import TensorInfo
from hydraserve.errors import UnsupportedFeatureError

NAME = "hydralora-transposed"
_TENSOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]|lora_router\.weight|lora_router\.bias)")
_ROUTER = ".lora_router.weight"


def recognise(config: AdapterConfig, names: Collection[str]) -> str | None:
    """Why this is the transposed form, or None."""
    if "expert_num" not in config.fields or not any(name.endswith(_ROUTER) for name in names):
        return None
    if not any(name.endswith(".lora_B") for name in names):
        return None
    return "expert_num in the config, tensors lora_A and lora_B without .weight, and lora_router"


def plan(config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> dict[str, ModulePlan]:
    """Module path -> plan, in the order of the file.

    Raises AdapterError's subclasses for whatever does not fit together.
    """
    strategy = config.fields.get("routing_strategy")
    if strategy not in (None, "soft"):
        raise UnsupportedFeatureError(
            "routing_strategy", got=repr(strategy), expected="'soft', a softmax over all heads", fix="none"
        )
    refuse_relatives(config, infos)
    refuse_features(config.fields)
    matcher = PatternMatcher(config.limits)
    ranks = config.counts("r", "rank_pattern", config.limits.rank, matcher)
    heads = config.counts("expert_num", "expert_num_pattern", config.limits.heads, matcher)
    alphas = config.alphas(matcher)
    modules = group(infos, _TENSOR)
    config.check_targets(modules, whole_components=True)
    return {
        path: _module(infos, path, parts, rank := ranks.of(path), heads.of(path), config.scaling(rank, alphas.of(path)))
        for path, parts in modules.items()
    }


def _module(
    infos: Mapping[str, TensorInfo], path: str, parts: Mapping[str, str], rank: int, heads: int, scaling: float
) -> StackedPlan:
    a, b = required(path, parts, "lora_A", "lora_A"), required(path, parts, "lora_B", "lora_B")
    router = required(path, parts, "lora_router.weight", "lora_router.weight")
    bias = parts.get("lora_router.bias")
    _, in_features = matrix(infos, router)
    out_features = infos[b].shape[-1] if infos[b].shape else 0
    expect(infos, router, (heads, in_features), "[E, in] by the configuration")
    expect(infos, a, (in_features, rank), "[in, r] by the router and the configuration")
    expect(infos, b, (heads, rank, out_features), "[E, r, out] by the configuration")
    if bias is not None:
        expect(infos, bias, (heads,), "a number for each head")
    return StackedPlan(
        layout=Layout(rank, heads, has_router=True, has_bias=bias is not None),
        scaling=scaling,
        in_features=in_features,
        out_features=out_features,
        dtype=widest(infos, parts.values()),
        a=(a,),
        heads=(b,),
        router=router,
        bias=bias,
        transposed=True,
    )
