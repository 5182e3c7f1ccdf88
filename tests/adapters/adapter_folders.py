"""Small adapter folders, written by hand: the tests' own idea of the formats, independent of the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

PREFIX = "base_model.model."
MODULES = {
    "model.layers.0.mlp.gate_proj": (12, 20),
    "model.layers.0.mlp.down_proj": (20, 12),
    "model.layers.10.mlp.gate_proj": (12, 20),
    "model.layers.2.self_attn.q_proj": (12, 12),
}
CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 6.0,
    "lora_dropout": 0.05,
    "lora_nums": 3,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["gate_proj", "down_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
}
LORA_CONFIG = {key: value for key, value in CONFIG.items() if key not in ("lora_nums", "enable_lora", "merge_weights")}
Tensors = dict[str, torch.Tensor]


def hydra_tensors(
    rank: int = 4, heads: int = 3, *, seed: int = 0, dtype: torch.dtype = torch.float32, prefix: str = PREFIX
) -> Tensors:
    """The authors' tensors for MODULES, in their order."""
    tensors: Tensors = {}
    for path in MODULES:
        tensors |= hydra_module(path, rank, heads, seed=seed, dtype=dtype, prefix=prefix)
    return tensors


def hydra_module(
    path: str, rank: int, heads: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, prefix: str = PREFIX
) -> Tensors:
    in_features, out_features = MODULES[path]
    g = torch.Generator().manual_seed(1000 * seed + list(MODULES).index(path))
    shapes = {"route": (heads, in_features), "A": (rank, in_features)}
    shapes |= {f"B{i}": (out_features, rank) for i in range(heads)}
    return {
        f"{prefix}{path}.lora_{part}.weight": torch.randn(*shape, generator=g).to(dtype)
        for part, shape in shapes.items()
    }


def lora_tensors(rank: int = 4, *, seed: int = 0, prefix: str = PREFIX) -> Tensors:
    """PEFT's tensors for MODULES."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (in_features, out_features) in MODULES.items():
        tensors[f"{prefix}{path}.lora_A.weight"] = torch.randn(rank, in_features, generator=g)
        tensors[f"{prefix}{path}.lora_B.weight"] = torch.randn(out_features, rank, generator=g)
    return tensors


def name_of(path: str, part: str) -> str:
    return f"{PREFIX}{path}.lora_{part}.weight"


def write(
    folder: Path,
    config: Mapping[str, Any] | bytes | None = None,
    tensors: Tensors | None = None,
    *,
    binary: bool = False,
    weights_name: str | None = None,
) -> Path:
    """A folder with both files; None: the default ones. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = config if isinstance(config, bytes) else json.dumps(CONFIG if config is None else config).encode()
    (folder / "adapter_config.json").write_bytes(data)
    write_tensors(folder, hydra_tensors() if tensors is None else tensors, binary=binary, name=weights_name)
    return folder


def write_tensors(folder: Path, tensors: Tensors, *, binary: bool = False, name: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if binary:
        path = folder / (name or "adapter_model.bin")
        torch.save(tensors, path)
    else:
        path = folder / (name or "adapter_model.safetensors")
        safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def edited(tensors: Tensors, change: Callable[[Tensors], object]) -> Tensors:
    """A copy with one change."""
    copy = {name: tensor.clone() for name, tensor in tensors.items()}
    change(copy)
    return copy
