"""What all writers of adapters share: the two files of a folder, and the numbers of its configuration."""

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

from hydraserve.adapters.locate import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME
from hydraserve.adapters.weights import HydraAdapter, HydraWeights
from hydraserve.errors import UnsupportedFeatureError

_Value = TypeVar("_Value", int, float)


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, as_safetensors: bool
) -> None:
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


def scaling_fields(adapter: HydraAdapter, *, rank_stabilized: bool) -> dict[str, Any]:
    """lora_alpha, alpha_pattern and use_rslora that give each module's scaling to the last bit, if any do.

    rank_stabilized: whether the layout's readers know use_rslora. It is set where only alpha / sqrt(r) gives the
    scaling: about one in eight of those that rsLoRA has is no float64 divided by r.
    """
    modules = adapter.modules.values()
    plain = all(_exact(weights, False) for weights in modules)
    rslora = rank_stabilized and not plain and all(_exact(weights, True) for weights in modules)
    alpha, pattern = default_and_pattern(adapter, lambda weights: _alpha(weights, _divisor(weights, rslora)))
    return {"lora_alpha": alpha, "alpha_pattern": pattern, "use_rslora": rslora}


def _exact(weights: HydraWeights, rslora: bool) -> bool:
    divisor = _divisor(weights, rslora)
    return _alpha(weights, divisor) / divisor == weights.scaling


def _divisor(weights: HydraWeights, rslora: bool) -> float:
    return math.sqrt(weights.layout.rank) if rslora else weights.layout.rank


def _alpha(weights: HydraWeights, divisor: float) -> float:
    """A float that gives the scaling when divided by `divisor`; the roundest of those near their product."""
    alpha = weights.scaling * divisor
    near = (float(f"{alpha:.9g}"), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in near if value / divisor == weights.scaling), alpha)


def default_and_pattern(
    adapter: HydraAdapter, value_of: Callable[[HydraWeights], _Value]
) -> tuple[_Value, dict[str, _Value]]:
    """The most frequent value, and {pattern that matches one module: value} for the modules that differ."""
    values = {path: value_of(weights) for path, weights in adapter.modules.items()}
    default = Counter(values.values()).most_common(1)[0][0]
    return default, {f"^{re.escape(path)}": value for path, value in values.items() if value != default}


def no_place(module: str, got: str, expected: str, layout: str) -> UnsupportedFeatureError:
    """The error for weights that a layout cannot hold."""
    return UnsupportedFeatureError(
        f"module {module}",
        got=got,
        expected=expected,
        fix=f"the {layout} layout cannot hold this; write another format",
    )
