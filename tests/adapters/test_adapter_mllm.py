"""MLLM-HydraLoRA: one router for three layers, its numbers read without running a pickle."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from family import PREFIX, SharedRouterMember, shared_routers
from hydra_kernels import Carry, Layout, reference

from hydraserve.adapters.checkpoint import inspect_adapter, load_adapter
from hydraserve.adapters.derive import derive
from hydraserve.adapters.formats.molora import save_molora
from hydraserve.adapters.save import save_hydralora
from hydraserve.adapters.store import AdapterStore, read_stored
from hydraserve.errors import AdapterConfigError, AdapterError, MissingTensorError, UnsupportedFeatureError

MLP = "model.layers.3.mlp"
SHAPES = {
    "model.layers.3.self_attn.q_proj": (24, 24),
    f"{MLP}.gate_proj": (24, 40),
    f"{MLP}.up_proj": (24, 40),
    f"{MLP}.down_proj": (40, 24),
}


@pytest.fixture(params=[True, False], ids=["dense", "argmax"])
def member(request: pytest.FixtureRequest) -> SharedRouterMember:
    return shared_routers(SHAPES, dense=request.param, seed=5)


def test_a_block_computes_what_its_own_layers_do(member: SharedRouterMember, tmp_path: Path) -> None:
    folder = member.write(tmp_path)
    summary, adapter = inspect_adapter(folder), load_adapter(folder)
    assert summary.format == adapter.format == "mllm-hydralora"
    assert summary.reason == "tensors mlp.router and shared_LoRA_A_gate, _up, _down in non_lora_trainables.bin"
    assert set(adapter.modules) == set(SHAPES)
    block = member.blocks[MLP].double()
    x, h = torch.randn(9, 24, dtype=torch.float64), torch.randn(9, 40, dtype=torch.float64)
    block.seen = x
    gate = adapter.modules[f"{MLP}.gate_proj"]
    logits = reference.router_logits(x, gate, torch.float64)
    for name, inputs in (("gate", x), ("up", x), ("down", h)):
        weights = adapter.modules[f"{MLP}.{name}_proj"]
        carry = {"gate": Carry.GIVES, "up": Carry.NONE, "down": Carry.TAKES}[name]
        routed = name != "down"
        expected = Layout(4, 4, top_k=0 if member.dense else 1, has_router=routed, has_bias=routed, carry=carry)
        assert weights.layout == summary.modules[f"{MLP}.{name}_proj"].layout == expected
        got = reference.delta(inputs, weights, torch.float64, logits)
        torch.testing.assert_close(got, block.delta(name, inputs), rtol=1e-9, atol=1e-12)
    block.float()


def test_the_attention_is_ordinary_lora(member: SharedRouterMember, tmp_path: Path) -> None:
    weights = load_adapter(member.write(tmp_path)).modules["model.layers.3.self_attn.q_proj"]
    assert weights.layout == Layout(4)
    x = torch.randn(5, 24)
    layer = member.attention.layers["model.layers.3.self_attn.q_proj"]
    torch.testing.assert_close(reference.delta(x, weights), layer(x))


def test_the_servers_store_keeps_what_is_shared(member: SharedRouterMember, tmp_path: Path) -> None:
    adapter = load_adapter(member.write(tmp_path / "adapter"))
    stored = AdapterStore(tmp_path / "store").add(adapter)
    again = read_stored(stored.path)
    assert again.digest == adapter.digest
    assert {p: w.layout for p, w in again.modules.items()} == {p: w.layout for p, w in adapter.modules.items()}


def test_adapters_derived_from_it(tmp_path: Path) -> None:
    adapter = load_adapter(shared_routers(SHAPES, dense=True, seed=5).write(tmp_path))
    path = f"{MLP}.down_proj"
    assert derive(adapter, "top_k=2").modules[path].layout == Layout(4, 4, top_k=2, carry=Carry.TAKES)
    assert derive(adapter, "uniform").modules[path].layout == Layout(4, 4)


def test_other_layouts_have_no_place_for_it(member: SharedRouterMember, tmp_path: Path) -> None:
    adapter = load_adapter(member.write(tmp_path / "adapter"))
    for save in (save_molora, save_hydralora):
        with pytest.raises(UnsupportedFeatureError, match="layout cannot hold this"):
            save(adapter, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


class Never:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open, (str(self.path),)


@pytest.mark.parametrize("dense", [True, False])
def test_the_numbers_of_a_pickle_that_is_never_run(dense: bool, tmp_path: Path) -> None:
    member = shared_routers(SHAPES, dense=dense, seed=5)
    folder = member.write(tmp_path / "adapter")
    expected = load_adapter(folder).digest
    (folder / "moe_args.json").unlink()
    arguments = argparse.Namespace(
        output_dir="./out", lora_rank=4, lora_alpha=8, dense_moe=dense, never=Never(tmp_path / "missing"), llm_moe=True
    )
    torch.save(arguments, folder / "moe_args.pth")
    assert load_adapter(folder).digest == expected


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 damaged", b"no pickle"])
def test_a_pickle_without_the_numbers(content: bytes, tmp_path: Path) -> None:
    folder = shared_routers(SHAPES, dense=True, seed=5).write(tmp_path)
    (folder / "moe_args.json").unlink()
    for write in (lambda: None, lambda: (folder / "moe_args.pth").write_bytes(content)):
        write()
        with pytest.raises(AdapterConfigError, match=r"moe_args\.json"):
            load_adapter(folder)


def test_the_projector_is_left_out_only_when_asked(tmp_path: Path) -> None:
    folder = shared_routers(SHAPES, dense=True, seed=5).write(tmp_path)
    expected = load_adapter(folder).digest
    tensors = torch.load(folder / "non_lora_trainables.bin")
    torch.save(
        {**tensors, f"{PREFIX}model.mm_projector.0.weight": torch.ones(24, 8)}, folder / "non_lora_trainables.bin"
    )
    with pytest.raises(UnsupportedFeatureError, match="language_model_only"):
        load_adapter(folder)
    fields = json.loads((folder / "moe_args.json").read_text())
    (folder / "moe_args.json").write_text(json.dumps({**fields, "language_model_only": True}))
    assert load_adapter(folder).digest == expected


def test_every_tensor_of_a_block_is_needed(tmp_path: Path) -> None:
    folder = shared_routers(SHAPES, dense=True, seed=5).write(tmp_path)
    tensors = torch.load(folder / "non_lora_trainables.bin")
    for name in tensors:
        if name.endswith("router.bias"):
            continue  # a router without a bias is a router
        torch.save({n: t for n, t in tensors.items() if n != name}, folder / "non_lora_trainables.bin")
        with pytest.raises(MissingTensorError):
            inspect_adapter(folder)
        changed = torch.cat([tensors[name], tensors[name][:, :1]], dim=1)
        torch.save({**tensors, name: changed}, folder / "non_lora_trainables.bin")
        with pytest.raises(AdapterError):
            inspect_adapter(folder)


@pytest.mark.parametrize("field", ["dense_moe", "lora_alpha"])
def test_numbers_that_are_null_are_not_there(field: str, tmp_path: Path) -> None:
    folder = shared_routers(SHAPES, dense=True, seed=5).write(tmp_path)
    fields = json.loads((folder / "moe_args.json").read_text())
    (folder / "moe_args.json").write_text(json.dumps({**fields, field: None}))
    with pytest.raises(AdapterConfigError, match=f"no {field}"):
        load_adapter(folder)
