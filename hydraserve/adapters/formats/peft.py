"""HydraLoRA as `hydraserve.tuner` and PEFT's save_pretrained write it: peft_type HYDRALORA, three tensors a module.

    hydralora_A.weight [r, in]    hydralora_B.weight [E, out, r]    hydralora_router.weight [E, in]

rank_pattern, num_heads_pattern, alpha_pattern and use_rslora mean what they mean for PEFT's LoRA.
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
from hydraserve.adapters.formats.plan import PREFIX, ModulePlan, StackedPlan, group, matrix, widest
from hydraserve.adapters.formats.writing import default_and_pattern, no_place, scaling_fields, write_folder
from hydraserve.adapters.tensors import TensorInfo
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import MissingTensorError, ShapeError

NAME = "hydralora-peft"
PEFT_TYPE = "HYDRALORA"
_TENSOR = re.compile(r"(?P<module>.+)\.hydralora_(?P<part>A|B|router)\.weight")
_EXPORT_AGAIN = "save the adapter again with save_pretrained()"


def recognise(config: AdapterConfig, names: Collection[str]) -> str | None:
    """Why this is our tuner's format, or None: others write the same peft_type with other tensors."""
    if config.fields.get("peft_type") != PEFT_TYPE or not any(_TENSOR.fullmatch(name) for name in names):
        return None
    return f"peft_type {PEFT_TYPE}, tensors hydralora_A, hydralora_B and hydralora_router"


def plan(config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> dict[str, ModulePlan]:
    """Module path -> plan, in the order of the file.

    Raises AdapterError's subclasses for whatever does not fit together.
    """
    refuse_features(config.fields)
    modules = group(infos, _TENSOR)
    config.check_targets(modules, whole_components=True)
    matcher = PatternMatcher(config.limits)
    ranks = config.counts("r", "rank_pattern", config.limits.rank, matcher)
    heads = config.counts("num_heads", "num_heads_pattern", config.limits.heads, matcher)
    alphas = config.alphas(matcher)
    plans: dict[str, ModulePlan] = {}
    for path, parts in modules.items():
        layout = Layout(rank=ranks.of(path), heads=heads.of(path), has_router=True)
        plans[path] = _module(infos, path, parts, layout, config.scaling(layout.rank, alphas.of(path)))
    return plans


def _module(
    infos: Mapping[str, TensorInfo], path: str, parts: Mapping[str, str], layout: Layout, scaling: float
) -> StackedPlan:
    for part in ("A", "B", "router"):
        if part not in parts:
            raise MissingTensorError(
                f"{path}.hydralora_{part}.weight",
                got=f"only {', '.join(sorted(parts.values()))}",
                expected="A, B and router",
                fix=_EXPORT_AGAIN,
            )
    a, b, router = parts["A"], parts["B"], parts["router"]
    _, in_features = matrix(infos, a)
    out_features = infos[b].shape[1] if len(infos[b].shape) == 3 else 0
    _expect(infos, a, (layout.rank, in_features))
    _expect(infos, b, (layout.heads, out_features, layout.rank))
    _expect(infos, router, (layout.heads, in_features))
    return StackedPlan(
        layout=layout,
        scaling=scaling,
        in_features=in_features,
        out_features=out_features,
        dtype=widest(infos, (a, b, router)),
        a=(a,),
        heads=(b,),
        router=router,
    )


def _expect(infos: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]) -> None:
    if infos[name].shape != shape or 0 in shape:
        raise ShapeError(
            name,
            got=f"shape {list(infos[name].shape)}",
            expected=f"{list(shape)}, by r and num_heads in adapter_config.json and the module's other tensors",
            fix="use the adapter_config.json saved with these tensors",
        )


def save_peft(adapter: HydraAdapter, path: Path | str, *, lora_dropout: float = 0.0) -> None:
    """Write an adapter as PEFT would, so that `PeftModel.from_pretrained` and the server load it.

    Where modules differ, r, num_heads and lora_alpha are the most frequent ones and the patterns name the others. Any
    scaling comes back as it was, see `scaling_fields`.

    Raises UnsupportedFeatureError for weights that the tuner has no place for. Nothing is written then.
    """
    for module, weights in adapter.modules.items():
        if weights.layout != Layout(rank=weights.layout.rank, heads=weights.layout.heads, has_router=True):
            raise no_place(
                module, str(weights.layout), "one A, a router without bias, a softmax over all heads", "tuner's"
            )
    write_folder(Path(path), _config(adapter, lora_dropout), _tensors(adapter), as_safetensors=True)


def _tensors(adapter: HydraAdapter) -> dict[str, torch.Tensor]:
    tensors = {}
    for module, weights in adapter.modules.items():
        assert weights.router is not None
        for name, tensor in (("A", weights.a), ("B", weights.b), ("router", weights.router)):
            tensors[f"{PREFIX}{module}.hydralora_{name}.weight"] = tensor
    return tensors


def _config(adapter: HydraAdapter, lora_dropout: float) -> dict[str, Any]:
    rank, rank_pattern = default_and_pattern(adapter, lambda weights: weights.layout.rank)
    heads, heads_pattern = default_and_pattern(adapter, lambda weights: weights.layout.heads)
    return {
        **scaling_fields(adapter, rank_stabilized=True),
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "lora_dropout": lora_dropout,
        "num_heads": heads,
        "num_heads_pattern": heads_pattern,
        "peft_type": PEFT_TYPE,
        "r": rank,
        "rank_pattern": rank_pattern,
        # Whole paths: last components alone would adapt every layer, also those that the adapter left out.
        "target_modules": list(adapter.modules),
        "task_type": "CAUSAL_LM",
    }
