"""Ordinary LoRA as PEFT saves it: lora_A.weight [r, in] and lora_B.weight [out, r] for each module.

Source: huggingface/peft 0.21, LoraConfig and get_peft_model_state_dict. A module's rank and alpha are those of the
first matching key of rank_pattern and alpha_pattern, else r and lora_alpha; s = alpha / r, with use_rslora
alpha / sqrt(r).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from hydra_kernels import Layout

from hydraserve.adapters.config import AdapterConfig, PatternMatcher
from hydraserve.adapters.formats.features import refuse_features
from hydraserve.adapters.formats.plan import ModulePlan, group, matrix, widest
from hydraserve.adapters.formats.relatives import refuse_relatives
from hydraserve.adapters.tensors import TensorInfo
from hydraserve.errors import MissingTensorError, ShapeError

NAME = "lora"
_TENSOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])\.weight")


def recognise(config: AdapterConfig, names: Collection[str]) -> str | None:
    """Why this is ordinary LoRA, or None."""
    if config.fields.get("peft_type") != "LORA" or config.fields.get("lora_nums") is not None:
        return None
    if not any(name.endswith(".lora_B.weight") for name in names) or any(".shared_LoRA_A_" in name for name in names):
        return None
    return "peft_type LORA without lora_nums, tensors lora_A and lora_B"


def plan(config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> dict[str, ModulePlan]:
    """Module path -> plan, in the order of the file.

    Raises AdapterError's subclasses for whatever does not fit together.
    """
    refuse_relatives(config, infos)
    refuse_features(config.fields)
    modules = group(infos, _TENSOR)
    config.check_targets(modules, whole_components=True)
    matcher = PatternMatcher(config.limits)
    ranks = config.counts("r", "rank_pattern", config.limits.rank, matcher)
    alphas = config.alphas(matcher)
    plans = {}
    for path, parts in modules.items():
        rank = ranks.of(path)
        plans[path] = plan_module(infos, path, parts, rank, config.scaling(rank, alphas.of(path)))
    return plans


def plan_module(
    infos: Mapping[str, TensorInfo], path: str, parts: Mapping[str, str], rank: int, scaling: float
) -> ModulePlan:
    """The plan of a module with the parts lora_A and lora_B. Raises MissingTensorError, ShapeError."""
    for part in ("lora_A", "lora_B"):
        if part not in parts:
            have = next(iter(parts.values()))
            raise MissingTensorError(
                f"{path}.{part}.weight", got=f"only {have}", expected="both", fix="export the adapter again"
            )
    a, b = parts["lora_A"], parts["lora_B"]
    rows, in_features = matrix(infos, a)
    out_features, columns = matrix(infos, b)
    for name, got, expected in ((a, rows, "rows"), (b, columns, "columns")):
        if got != rank:
            raise ShapeError(
                name,
                got=f"shape {list(infos[name].shape)}",
                expected=f"{rank} {expected}, the rank by adapter_config.json",
                fix="use the adapter_config.json saved with these tensors",
            )
    return ModulePlan(
        layout=Layout(rank),
        scaling=scaling,
        in_features=in_features,
        out_features=out_features,
        dtype=widest(infos, (a, b)),
        a=(a,),
        heads=(b,),
    )
