"""Writing adapters: the authors' layout of HydraLoRA, and ordinary LoRA as PEFT has it."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch

from hydraserve.adapters.formats.plan import PREFIX
from hydraserve.adapters.locate import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME
from hydraserve.adapters.weights import HydraAdapter, HydraWeights
from hydraserve.errors import UnsupportedFeatureError

_Value = TypeVar("_Value", int, float)


def save_adapter(adapter: HydraAdapter, path: Path | str) -> None:
    """Write an adapter in the layout of its own format, "hydralora" or "lora".

    Raises UnsupportedFeatureError when that layout has no place for it.
    """
    (save_lora if adapter.format == "lora" else save_hydralora)(adapter, path)


def save_hydralora(
    adapter: HydraAdapter, path: Path | str, *, safetensors: bool = False, lora_dropout: float = 0.0
) -> None:
    """Write the layout that the authors' training leaves on disk: adapter_config.json and adapter_model.bin.

    safetensors:  write adapter_model.safetensors instead, with the same tensors.
    lora_dropout: of the training, for the record; it has no effect on inference.

    Where all layers have one r, E and alpha, the configuration has exactly the authors' 14 fields. Otherwise `r`,
    `lora_nums` and `lora_alpha` are the most frequent ones and `rank_pattern`, `lora_nums_pattern` and
    `alpha_pattern` are added, which `load_adapter` follows. The authors' own code ignores these fields: it then
    stops at the shapes of the router or of B, rather than to compute something else.

    `lora_alpha` is what gives the layer's scaling when it is divided by r, so the digest stays what it was (a scaling
    that no float64 divided by r gives, which no training produces, comes back one unit in the last place away).

    Raises UnsupportedFeatureError for weights that this layout has no place for: no router, one A per head, top-k, a
    router bias. Nothing is written then.
    """
    for module, weights in adapter.modules.items():
        _check_hydralora(module, weights)
    tensors = {}
    for module, weights in adapter.modules.items():
        assert weights.router is not None
        tensors[f"{PREFIX}{module}.lora_route.weight"] = weights.router
        tensors[f"{PREFIX}{module}.lora_A.weight"] = weights.a
        for i, head in enumerate(weights.b):
            tensors[f"{PREFIX}{module}.lora_B{i}.weight"] = head
    heads, heads_pattern = _default_and_pattern(adapter, lambda weights: weights.layout.heads)
    config = {
        "enable_lora": None,
        "lora_dropout": lora_dropout,
        "lora_nums": heads,
        "merge_weights": False,
        **_common_fields(adapter),
    }
    if heads_pattern:
        config["lora_nums_pattern"] = heads_pattern
    _write(Path(path), config, tensors, safetensors)


def save_lora(adapter: HydraAdapter, path: Path | str, *, safetensors: bool = True, lora_dropout: float = 0.0) -> None:
    """Write an ordinary LoRA folder that PEFT loads.

    Raises UnsupportedFeatureError for an adapter with a router or with several heads. Nothing is written then.
    """
    for module, weights in adapter.modules.items():
        if weights.layout.heads != 1 or weights.layout.has_router:
            raise _no_place(module, f"{weights.layout.heads} heads with a router", "one head without a router", "LoRA")
    tensors = {}
    for module, weights in adapter.modules.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = weights.a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = weights.b[0]
    config = {
        "init_lora_weights": True,
        "lora_dropout": lora_dropout,
        "use_dora": False,
        "use_rslora": False,
        **_common_fields(adapter),
    }
    _write(Path(path), config, tensors, safetensors)


def _check_hydralora(module: str, weights: HydraWeights) -> None:
    layout = weights.layout
    faults = {
        "no router": not layout.has_router,
        "one A for each head": not layout.shared_a,
        f"top-{layout.top_k} routing": layout.top_k != 0,
        "a router bias": layout.has_bias,
    }
    for got, present in faults.items():
        if present:
            raise _no_place(module, got, "one A, a router without bias, a softmax over all heads", "HydraLoRA")


def _no_place(module: str, got: str, expected: str, layout: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"module {module}",
        got=got,
        expected=expected,
        fix=f"the {layout} layout cannot hold this; write another format",
    )


def _common_fields(adapter: HydraAdapter) -> dict[str, Any]:
    """What both layouts have: the sizes, and the fields that never vary."""
    rank, rank_pattern = _default_and_pattern(adapter, lambda weights: weights.layout.rank)
    alpha, alpha_pattern = _default_and_pattern(adapter, _alpha)
    fields: dict[str, Any] = {
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(dict.fromkeys(path.rpartition(".")[2] for path in adapter.modules)),
        "task_type": "CAUSAL_LM",
    }
    patterns = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    return fields | {name: pattern for name, pattern in patterns.items() if pattern}


def _default_and_pattern(
    adapter: HydraAdapter, value_of: Callable[[HydraWeights], _Value]
) -> tuple[_Value, dict[str, _Value]]:
    """The most frequent value, and {pattern that matches one module: value} for the modules that differ."""
    values = {path: value_of(weights) for path, weights in adapter.modules.items()}
    default = Counter(values.values()).most_common(1)[0][0]
    return default, {f"^{re.escape(path)}": value for path, value in values.items() if value != default}


def _alpha(weights: HydraWeights) -> float:
    """A float that gives the scaling when divided by r; the roundest of those near s * r."""
    rank = weights.layout.rank
    alpha = weights.scaling * rank
    near = (float(f"{alpha:.9g}"), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in near if value / rank == weights.scaling), alpha)


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], as_safetensors: bool) -> None:
    """Both files. The configuration comes last: a folder without it is no adapter, so none is ever half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    # Each tensor with memory of its own: torch.save would write the whole stack of heads for every view of it.
    own = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    name, other = (SAFETENSORS_NAME, BIN_NAME) if as_safetensors else (BIN_NAME, SAFETENSORS_NAME)
    part = folder / f".{name}.part"
    if as_safetensors:
        safetensors.torch.save_file(own, part, metadata={"format": "pt"})
    else:
        torch.save(own, part)
    os.replace(part, folder / name)
    (folder / other).unlink(missing_ok=True)
    part = folder / f".{CONFIG_NAME}.part"
    part.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    os.replace(part, folder / CONFIG_NAME)
