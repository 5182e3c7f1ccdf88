"""MoLoRA: a layout with a place for every gate that can be served, with the semantics of parameter-efficient-moe.

Source of the semantics: for-ai/parameter-efficient-moe (arXiv:2309.05444), whose JAX checkpoints are arrays in no
common file format; this is where to put them. For each adapted linear layer

    {module}.molora_A.weight [E, r, in], or [r, in] for one A that all heads share
    {module}.molora_B.weight [E, out, r]
    {module}.molora_router.weight [E, in] and .bias [E], each optional

and in adapter_config.json

    peft_type     "MOLORA"
    r, num_experts, lora_alpha     with rank_pattern, num_experts_pattern, alpha_pattern as in PEFT; use_rslora too
    top_k         the k largest weights of the softmax count; 0 or null: all
    renormalize   whether those are scaled to sum to one; default false, as in the source

w = softmax of the router (and its bias) in float32 over all heads; s = lora_alpha / r, there 16 / r. A module without a
router mixes its heads evenly.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra_kernels import Layout

from hydraserve.adapters.config import AdapterConfig, PatternMatcher
from hydraserve.adapters.formats.features import refuse_features
from hydraserve.adapters.formats.mixture import expect, required
from hydraserve.adapters.formats.plan import PREFIX, ModulePlan, StackedPlan, group, widest
from hydraserve.adapters.formats.writing import default_and_pattern, no_place, scaling_fields, write_folder
from hydraserve.adapters.tensors import TensorInfo
from hydraserve.adapters.weights import HydraAdapter

NAME = "molora"
PEFT_TYPE = "MOLORA"
_TENSOR = re.compile(r"(?P<module>.+)\.molora_(?P<part>A\.weight|B\.weight|router\.weight|router\.bias)")


def recognise(config: AdapterConfig, names: Collection[str]) -> str | None:
    """Why this is the MoLoRA layout, or None."""
    if config.fields.get("peft_type") != PEFT_TYPE or not any(_TENSOR.fullmatch(name) for name in names):
        return None
    return f"peft_type {PEFT_TYPE}, tensors molora_A, molora_B and molora_router"


def plan(config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> dict[str, ModulePlan]:
    """Module path -> plan, in the order of the file.

    Raises AdapterError's subclasses for whatever does not fit together.
    """
    refuse_features(config.fields)
    matcher = PatternMatcher(config.limits)
    ranks = config.counts("r", "rank_pattern", config.limits.rank, matcher)
    heads = config.counts("num_experts", "num_experts_pattern", config.limits.heads, matcher)
    alphas = config.alphas(matcher)
    top_k, renormalize = config.whole("top_k"), config.flag("renormalize")
    modules = group(infos, _TENSOR)
    config.check_targets(modules, whole_components=True)
    plans: dict[str, ModulePlan] = {}
    for path, parts in modules.items():
        rank, experts = ranks.of(path), heads.of(path)
        if has_router := any(part.startswith("router.") for part in parts):
            required(path, parts, "router.weight", "molora_router.weight")
        kept = top_k if has_router and top_k < experts else 0
        layout = Layout(
            rank,
            experts,
            shared_a=len(infos[required(path, parts, "A.weight", "molora_A.weight")].shape) == 2,
            top_k=kept,
            renormalize=renormalize or not kept,
            has_router=has_router,
            has_bias="router.bias" in parts,
        )
        plans[path] = _module(infos, path, parts, layout, config.scaling(rank, alphas.of(path)))
    return plans


def _module(
    infos: Mapping[str, TensorInfo], path: str, parts: Mapping[str, str], layout: Layout, scaling: float
) -> StackedPlan:
    a, b = parts["A.weight"], required(path, parts, "B.weight", "molora_B.weight")
    router, bias = parts.get("router.weight"), parts.get("router.bias")
    in_features = infos[a].shape[-1] if infos[a].shape else 0
    out_features = infos[b].shape[1] if len(infos[b].shape) == 3 else 0
    shape = (layout.rank, in_features) if layout.shared_a else (layout.heads, layout.rank, in_features)
    expect(infos, a, shape, "[E, r, in] or [r, in] by the configuration")
    expect(infos, b, (layout.heads, out_features, layout.rank), "[E, out, r] by the configuration")
    if bias is not None:
        expect(infos, bias, (layout.heads,), "a number for each head")
    if router is not None:
        expect(infos, router, (layout.heads, in_features), "[E, in] by the configuration and A")
    return StackedPlan(
        layout=layout,
        scaling=scaling,
        in_features=in_features,
        out_features=out_features,
        dtype=widest(infos, parts.values()),
        a=(a,),
        heads=(b,),
        router=router,
        bias=bias,
    )


def save_molora(adapter: HydraAdapter, path: Path | str) -> None:
    """Write this layout; every adapter fits but one whose modules disagree about
    top-k or share routers.

    Raises UnsupportedFeatureError for that. Nothing is written then.
    """
    for module, weights in adapter.modules.items():
        if weights.layout.carry:
            raise no_place(module, "a router that several modules share", "a router for each module", "MoLoRA")
    top_k, renormalize = _common_top_k(adapter)
    rank, rank_pattern = default_and_pattern(adapter, lambda weights: weights.layout.rank)
    heads, heads_pattern = default_and_pattern(adapter, lambda weights: weights.layout.heads)
    config: dict[str, Any] = {
        **scaling_fields(adapter, rank_stabilized=True),
        "base_model_name_or_path": adapter.base_model,
        "num_experts": heads,
        "num_experts_pattern": heads_pattern,
        "peft_type": PEFT_TYPE,
        "r": rank,
        "rank_pattern": rank_pattern,
        "renormalize": renormalize,
        "target_modules": list(adapter.targets),
        "task_type": "CAUSAL_LM",
        "top_k": top_k,
    }
    write_folder(Path(path), config, _tensors(adapter), as_safetensors=True)


def _common_top_k(adapter: HydraAdapter) -> tuple[int, bool]:
    """(top_k, renormalize) of all modules, (0, False) when all heads count everywhere."""
    found = {(layout.top_k, layout.renormalize) for layout in adapter.layouts if layout.top_k} or {(0, False)}
    chosen = next(iter(found))
    for module, weights in adapter.modules.items():
        layout = weights.layout
        fits = layout.top_k == chosen[0] or (not layout.top_k and (layout.heads <= chosen[0] or not layout.has_router))
        if len(found) > 1 or not fits:
            raise no_place(module, f"top-{layout.top_k or layout.heads}", f"top-{chosen[0]} everywhere", "MoLoRA")
    return chosen


def _tensors(adapter: HydraAdapter) -> dict[str, torch.Tensor]:
    tensors = {}
    for module, weights in adapter.modules.items():
        layout, name = weights.layout, f"{PREFIX}{module}.molora_"
        shared = layout.shared_a
        tensors[f"{name}A.weight"] = weights.a if shared else weights.a.view(layout.heads, layout.rank, -1)
        tensors[f"{name}B.weight"] = weights.b
        for part, tensor in (("weight", weights.router), ("bias", weights.bias)):
            if tensor is not None:
                tensors[f"{name}router.{part}"] = tensor
    return tensors
