"""Methods whose mathematics the gate cannot carry are refused by name, never read as something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import CONFIG, LORA_CONFIG, PREFIX, Tensors, hydra_tensors, lora_tensors, write

from hydraserve.adapters.checkpoint import inspect_adapter, load_adapter
from hydraserve.errors import AdapterError, ShapeError, UnsupportedFeatureError

MLP = f"{PREFIX}model.layers.0.mlp"
GATE = f"{MLP}.gate_proj"


def tensors(**shapes: tuple[int, ...]) -> Tensors:
    """Part of a name after the module -> a tensor of this shape; `__` stands for a dot."""
    return {f"{GATE}.{name.replace('__', '.')}": torch.ones(shape) for name, shape in shapes.items()}


ROUTE = {"lora_route__weight": (2, 12)}
HEADS = {"lora_B0__weight": (20, 4), "lora_B1__weight": (20, 4)}
FAMILY: dict[str, tuple[dict[str, Any], Tensors, str]] = {
    "PEFT fork, by its type": ({**CONFIG, "peft_type": "HYDRALORA"}, lora_tensors(), "HydraLoRA by a PEFT fork"),
    "PEFT fork, languages": (
        {**CONFIG, "peft_type": "HYDRALORA", "lora_num": 2, "language_router_mode": "hard"},
        tensors(**ROUTE, lora_A__weight=(4, 12), lora_B__0__weight=(20, 4), lora_B__1__weight=(20, 4)),
        "language_router_mode",
    ),
    "PEFT fork, hierarchical": (
        CONFIG,
        tensors(lora_A__expert_0__weight=(4, 12), lora_route__expert_0__weight=(2, 12), router__weight=(2, 12)),
        "hierarchical",
    ),
    "no router, numbered heads": (
        LORA_CONFIG,
        tensors(lora_A__weight=(4, 12), lora_B__0__weight=(20, 4), lora_B__1__weight=(20, 4)),
        "without a router",
    ),
    "MixLoRA": (
        {**CONFIG, "peft_type": "MIXLORA", "top_k": 2},
        {
            "mixlora.layers.0.mlp.moe_gate.weight": torch.ones(2, 12),
            "mixlora.layers.0.mlp.up_proj.experts.0.lora_A.weight": torch.ones(4, 12),
        },
        "MixLoRA",
    ),
    "LORAMOE of another project": (
        {**CONFIG, "peft_type": "LORAMOE", "lora_nums": None},
        lora_tensors(),
        "LoRAMoE, with",
    ),
    "hydra.router": (LORA_CONFIG, tensors(hydra__lora_A__0__weight=(4, 12), hydra__router__bias=(2,)), "hydra.router"),
    "mtLoRA's routing": (
        {**CONFIG, "enable_fine_grained_routing": True},
        hydra_tensors(),
        "enable_fine_grained_routing: got True: mtLoRA",
    ),
    "mtLoRA's blocks": (
        CONFIG,
        hydra_tensors() | {f"{PREFIX}model.layers.0.mlp.block_adapter.lora_A.weight": torch.ones(4, 12)},
        "block adapters",
    ),
    "HydraFed-LEASE's universal head": (
        {**CONFIG, "lora_nums": 2, "universal_idx": 0},
        tensors(**ROUTE, **HEADS, lora_A0__weight=(4, 12), lora_A1__weight=(4, 12)),
        "universal_idx",
    ),
    "HydraFed-LEASE, without its A tensors": ({**CONFIG, "adaptive": True}, hydra_tensors(), "HydraFed-LEASE"),
    "top-k": ({**CONFIG, "top_k": 1}, hydra_tensors(), "top_k: got 1: top-k routing"),
    "noisy": (CONFIG, tensors(**ROUTE, lora_A__weight=(4, 12), lora_Bs__0__weight=(20, 4)), "noisy top-k"),
    "HMoRA": ({**CONFIG, "peft_type": "HydraLoRA"}, tensors(mora_a_q=(4, 12), mora_b_q=(20, 8)), "HMoRA"),
    "CuMA": ({**CONFIG, "peft_type": "CuMA"}, tensors(lora_a__weight=(4, 12), lora_b__0__weight=(20, 4)), "CuMA"),
    "images": (CONFIG, tensors(lora_down__weight=(4, 12), lora_up_weight=(2, 20, 4)), "image models"),
    "MMOE-LoRA": (CONFIG, tensors(lora_A__default__loraA__0__mlp__weight=(4, 12)), "MMOE-LoRA"),
}


@pytest.mark.parametrize("name", FAMILY)
def test_a_relative_is_refused_by_name(tmp_path: Path, name: str) -> None:
    config, content, text = FAMILY[name]
    folder = write(tmp_path, config, content)
    for read in (inspect_adapter, load_adapter):
        with pytest.raises(AdapterError) as caught:
            read(folder)
        assert type(caught.value) is UnsupportedFeatureError, str(caught.value)
        assert text in str(caught.value)


@pytest.mark.parametrize("rows", [5, 6, 12], ids=["2E-1", "2E", "4E"])
def test_routers_with_other_rows_than_heads(tmp_path: Path, rows: int) -> None:
    """HydraFed-LEASE's adaptive and mtLoRA's fine-grained routers, when the config does not say so."""
    content = hydra_tensors()
    for name in [name for name in content if "route" in name]:
        content[name] = torch.ones(rows, content[name].shape[1])
    with pytest.raises(ShapeError, match=rf"got {rows} rows, expected 3.*mtLoRA.*HydraFed-LEASE"):
        load_adapter(write(tmp_path, CONFIG, content))


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "moe_args.pth"])
def test_trained_weights_beside_the_adapters_file(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, LORA_CONFIG, lora_tensors())
    projector = {f"{PREFIX}model.mm_projector.0.weight": torch.ones(4, 4)}
    torch.save(projector if name.endswith(".bin") else object, folder / name)
    with pytest.raises(UnsupportedFeatureError, match=name):
        load_adapter(folder)
