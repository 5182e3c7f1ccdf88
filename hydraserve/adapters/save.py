"""Writing adapters: the authors' layout of HydraLoRA, its ancestor LoRAMoE's, and ordinary LoRA as PEFT has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydraserve.adapters.formats.plan import PREFIX
from hydraserve.adapters.formats.writing import default_and_pattern, no_place, scaling_fields, write_folder
from hydraserve.adapters.weights import HydraAdapter, HydraWeights


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

    `lora_alpha` is what gives the layer's scaling when it is divided by r, so the digest stays what it was. Some
    scalings of rsLoRA are no float64 divided by r; such a one comes back one unit in the last place away.

    Raises UnsupportedFeatureError for weights that this layout has no place for: no router, one A per head, top-k, a
    router bias. Nothing is written then.
    """
    _save_mixture(adapter, Path(path), safetensors, lora_dropout, shared_a=True)


def save_loramoe(
    adapter: HydraAdapter, path: Path | str, *, safetensors: bool = False, lora_dropout: float = 0.0
) -> None:
    """Write LoRAMoE's layout, with one A for each head; the rest is as in `save_hydralora`."""
    _save_mixture(adapter, Path(path), safetensors, lora_dropout, shared_a=False)


def _save_mixture(adapter: HydraAdapter, path: Path, safetensors: bool, lora_dropout: float, *, shared_a: bool) -> None:
    for module, weights in adapter.modules.items():
        _check_mixture(module, weights, shared_a)
    tensors = {}
    for module, weights in adapter.modules.items():
        assert weights.router is not None
        layout, name = weights.layout, f"{PREFIX}{module}.lora_"
        tensors[f"{name}route.weight"] = weights.router
        for i, a in enumerate(weights.a.view(-1, layout.rank, weights.in_features)):
            tensors[f"{name}A{'' if shared_a else i}.weight"] = a
        for i, head in enumerate(weights.b):
            tensors[f"{name}B{i}.weight"] = head
    heads, heads_pattern = default_and_pattern(adapter, lambda weights: weights.layout.heads)
    config = {
        "enable_lora": None,
        "lora_dropout": lora_dropout,
        "lora_nums": heads,
        "merge_weights": False,
        **_common_fields(adapter, rank_stabilized=False),  # the authors' code would not follow use_rslora
    }
    if heads_pattern:
        config["lora_nums_pattern"] = heads_pattern
    write_folder(path, config, tensors, as_safetensors=safetensors)


def save_lora(adapter: HydraAdapter, path: Path | str, *, safetensors: bool = True, lora_dropout: float = 0.0) -> None:
    """Write an ordinary LoRA folder that PEFT loads.

    Raises UnsupportedFeatureError for an adapter with a router or with several heads. Nothing is written then.
    """
    for module, weights in adapter.modules.items():
        if weights.layout.heads != 1 or weights.layout.has_router:
            raise no_place(module, f"{weights.layout.heads} heads with a router", "one head without a router", "LoRA")
    tensors = {}
    for module, weights in adapter.modules.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = weights.a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = weights.b[0]
    config = {
        "init_lora_weights": True,
        "lora_dropout": lora_dropout,
        "use_dora": False,
        **_common_fields(adapter, rank_stabilized=True),
        # Whole paths: last components alone would adapt every layer, also those that the adapter left out.
        "target_modules": list(adapter.modules),
    }
    write_folder(Path(path), config, tensors, as_safetensors=safetensors)


def _check_mixture(module: str, weights: HydraWeights, shared_a: bool) -> None:
    layout = weights.layout
    faults = {
        "no router": not layout.has_router,
        "one A for each head": shared_a and not layout.shared_a,
        "one A for all heads": not shared_a and layout.shared_a,
        f"top-{layout.top_k} routing": layout.top_k != 0,
        "a router bias": layout.has_bias,
        "a router that several modules share": bool(layout.carry),
    }
    expected = f"one A{'' if shared_a else ' for each head'}, a router without bias, a softmax over all heads"
    for got, present in faults.items():
        if present:
            raise no_place(module, got, expected, "HydraLoRA" if shared_a else "LoRAMoE")


def _common_fields(adapter: HydraAdapter, *, rank_stabilized: bool) -> dict[str, Any]:
    """What both layouts have: the sizes, and the fields that never vary. rank_stabilized: see `scaling_fields`."""
    rank, rank_pattern = default_and_pattern(adapter, lambda weights: weights.layout.rank)
    scaling = scaling_fields(adapter, rank_stabilized=rank_stabilized)
    fields: dict[str, Any] = {
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": scaling["lora_alpha"],
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(dict.fromkeys(path.rpartition(".")[2] for path in adapter.modules)),
        "task_type": "CAUSAL_LM",
    }
    if rank_stabilized:
        fields["use_rslora"] = scaling["use_rslora"]
    patterns = {"rank_pattern": rank_pattern, "alpha_pattern": scaling["alpha_pattern"]}
    return fields | {name: pattern for name, pattern in patterns.items() if pattern}
