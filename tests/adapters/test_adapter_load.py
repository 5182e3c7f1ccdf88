"""Reading good folders: the authors' layout and PEFT's, from both kinds of files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import (
    CONFIG,
    LORA_CONFIG,
    MODULES,
    edited,
    hydra_module,
    hydra_tensors,
    lora_tensors,
    name_of,
    write,
)
from hydra_kernels import Layout, SlotCapacity

from hydraserve.adapters.checkpoint import inspect_adapter, load_adapter
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.adapters.weights import HydraWeights, content_digest

Q = "model.layers.2.self_attn.q_proj"


@pytest.mark.parametrize("binary", [True, False], ids=["bin", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hydralora_weights_are_the_files(tmp_path: Path, binary: bool, dtype: torch.dtype) -> None:
    tensors = hydra_tensors(dtype=dtype)
    adapter = load_adapter(write(tmp_path, CONFIG, tensors, binary=binary))
    assert adapter.format == "hydralora"
    assert set(adapter.modules) == set(MODULES)
    assert adapter.base_model == "org/base"
    assert adapter.source == tmp_path
    for path, weights in adapter.modules.items():
        assert weights.layout == Layout(4, 3, has_router=True)
        assert weights.scaling == 6.0 / 4
        assert torch.equal(weights.a, tensors[name_of(path, "A")])
        assert weights.router is not None
        assert torch.equal(weights.router, tensors[name_of(path, "route")])
        for i in range(3):
            assert torch.equal(weights.b[i], tensors[name_of(path, f"B{i}")])
        assert {weights.a.dtype, weights.b.dtype, weights.router.dtype} == {dtype}


def test_sizes_of_an_adapter(tmp_path: Path) -> None:
    adapter = load_adapter(write(tmp_path))
    assert (adapter.rank, adapter.heads, adapter.uniform) == (4, 3, True)
    assert adapter.targets == ("down_proj", "gate_proj", "q_proj")
    assert adapter.capacity == SlotCapacity(rows=7, k=12, heads=3)
    assert adapter.nbytes == 4 * sum(t.numel() for t in hydra_tensors().values())


@pytest.mark.parametrize("binary", [True, False], ids=["bin", "safetensors"])
def test_inspection_tells_what_loading_finds(tmp_path: Path, binary: bool) -> None:
    folder = write(tmp_path, CONFIG, hydra_tensors(dtype=torch.bfloat16), binary=binary)
    summary, adapter = inspect_adapter(folder), load_adapter(folder)
    assert summary.format == adapter.format
    assert summary.reason == "lora_nums in the config and tensors lora_route and lora_B0, lora_B1, ..."
    assert (summary.nbytes, summary.capacity, summary.targets) == (adapter.nbytes, adapter.capacity, adapter.targets)
    assert summary.dtypes == ("bfloat16",)
    assert list(summary.modules) == list(adapter.modules)
    for path, module in summary.modules.items():
        weights = adapter.modules[path]
        assert (module.in_features, module.out_features) == MODULES[path]
        assert (module.layout, module.scaling) == (weights.layout, weights.scaling)


def test_inspection_does_not_read_the_weights(tmp_path: Path) -> None:
    """Neither kind of file: with the data overwritten by NaN bytes, only loading notices."""
    for binary in (False, True):
        folder = write(tmp_path / str(binary), CONFIG, hydra_tensors(), binary=binary)
        (path,) = folder.glob("adapter_model.*")
        data = bytearray(path.read_bytes())
        needle = hydra_tensors()[name_of(Q, "A")].numpy().tobytes()
        start = data.index(needle)
        data[start : start + len(needle)] = b"\xff" * len(needle)
        path.write_bytes(data)
        assert inspect_adapter(folder).rank == 4
        with pytest.raises(Exception, match=r"lora_A|checksum"):
            load_adapter(folder)


def test_the_digest_is_of_the_content_not_of_the_file(tmp_path: Path) -> None:
    a = load_adapter(write(tmp_path / "a", CONFIG, hydra_tensors(), binary=True))
    b = load_adapter(write(tmp_path / "b", CONFIG, hydra_tensors(), binary=False))
    c = load_adapter(write(tmp_path / "c", {**CONFIG, "lora_dropout": 0.5}, hydra_tensors(prefix="")))
    assert a.digest == b.digest == c.digest == content_digest(a.modules)
    assert len(a.digest) == 64


@pytest.mark.parametrize("part", ["A", "route", "B0", "B2"])
def test_the_digest_notices_one_bit_of_any_tensor(tmp_path: Path, part: str) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name_of(Q, part)].view(torch.int32)[-1, -1] ^= 1

    a = load_adapter(write(tmp_path / "a"))
    b = load_adapter(write(tmp_path / "b", CONFIG, edited(hydra_tensors(), flip)))
    assert a.digest != b.digest


@pytest.mark.parametrize("change", [{"lora_alpha": 6.5}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}])
def test_the_digest_notices_the_scaling(tmp_path: Path, change: dict[str, Any]) -> None:
    assert (
        load_adapter(write(tmp_path / "a")).digest != load_adapter(write(tmp_path / "b", {**CONFIG, **change})).digest
    )


def test_the_digest_notices_swapped_heads_and_moved_modules(tmp_path: Path) -> None:
    tensors = hydra_tensors()
    swapped = tensors | {name_of(Q, "B0"): tensors[name_of(Q, "B1")], name_of(Q, "B1"): tensors[name_of(Q, "B0")]}
    moved = {name.replace("layers.2.", "layers.3."): tensor for name, tensor in tensors.items()}
    digests = {
        load_adapter(write(tmp_path / str(i), CONFIG, t)).digest for i, t in enumerate((tensors, swapped, moved))
    }
    assert len(digests) == 3


def test_the_digest_does_not_depend_on_where_tensors_lie_in_memory() -> None:
    """In one block as a file's do, in the block's opposite order, with gaps, or each on its own."""
    apart = make_adapter({f"layers.{i}.q_proj": (16, 16) for i in range(3)}, ("q_proj",), 2, 3).modules
    names = [(path, part) for path in sorted(apart) for part in ("a", "b", "router")]

    def laid_out(order: list[tuple[str, str]], gap: int) -> dict[str, HydraWeights]:
        block = torch.full((2, sum(getattr(apart[path], part).numel() + gap for path, part in order)), 7.0)[1]
        views: dict[tuple[str, str], torch.Tensor] = {}
        end = 0
        for path, part in order:
            tensor = getattr(apart[path], part)
            views[path, part] = block[end : end + tensor.numel()].view(tensor.shape).copy_(tensor)
            end += tensor.numel() + gap
        return {path: replace(apart[path], **{p: views[path, p] for p in ("a", "b", "router")}) for path in apart}

    expected = content_digest(apart)
    for order, gap in ((names, 0), (names[::-1], 0), (names, 1)):
        assert content_digest(laid_out(order, gap)) == expected
    changed = laid_out(names, 0)
    changed["layers.2.q_proj"].router[-1, -1] += 1  # type: ignore[index]
    assert content_digest(changed) != expected


def test_tensor_types_may_differ_within_a_module(tmp_path: Path) -> None:
    tensors = hydra_tensors(dtype=torch.bfloat16)
    tensors[name_of(Q, "route")] = tensors[name_of(Q, "route")].float() + 1e-6
    adapter = load_adapter(write(tmp_path, CONFIG, tensors))
    router = adapter.modules[Q].router
    assert router is not None
    assert torch.equal(router, tensors[name_of(Q, "route")])
    assert torch.equal(adapter.modules[Q].b[0], tensors[name_of(Q, "B0")].float())
    assert adapter.modules["model.layers.0.mlp.gate_proj"].a.dtype == torch.bfloat16


def test_layers_of_different_rank_and_heads(tmp_path: Path) -> None:
    gate = "model.layers.0.mlp.gate_proj"
    tensors = hydra_tensors() | hydra_module(Q, 2, 5)
    del tensors[name_of(gate, "B2")]
    tensors[name_of(gate, "route")] = tensors[name_of(gate, "route")][:2]
    adapter = load_adapter(write(tmp_path, CONFIG, tensors))
    assert adapter.modules[Q].layout == Layout(2, 5, has_router=True)
    assert adapter.modules[Q].scaling == 6.0 / 2, "alpha / r with the layer's own r"
    assert adapter.modules[gate].layout == Layout(4, 2, has_router=True)
    assert (adapter.rank, adapter.heads, adapter.uniform) == (4, 5, False)
    assert adapter.capacity == SlotCapacity(rows=7, k=12, heads=5)


def test_patterns_in_a_hydralora_config(tmp_path: Path) -> None:
    config = {
        **CONFIG,
        "rank_pattern": {r".*\.self_attn\..*": 2},
        "lora_nums_pattern": {"self_attn.q_proj": 5},
        "alpha_pattern": {"^model.layers.0.mlp.gate_proj": 1},
    }
    adapter = load_adapter(write(tmp_path, config, hydra_tensors() | hydra_module(Q, 2, 5)))
    assert adapter.modules[Q].layout == Layout(2, 5, has_router=True)
    assert adapter.modules["model.layers.0.mlp.gate_proj"].scaling == 1 / 4
    assert adapter.modules["model.layers.10.mlp.gate_proj"].scaling == 6 / 4


def test_lora_weights_are_the_files(tmp_path: Path) -> None:
    tensors = lora_tensors()
    adapter = load_adapter(write(tmp_path, LORA_CONFIG, tensors))
    assert adapter.format == "lora"
    for path, weights in adapter.modules.items():
        assert weights.layout == Layout(4)
        assert weights.scaling == 6.0 / 4
        assert weights.router is None
        assert torch.equal(weights.a, tensors[name_of(path, "A")])
        assert torch.equal(weights.b, tensors[name_of(path, "B")][None])


def test_lora_patterns_the_first_match_at_a_dot_wins(tmp_path: Path) -> None:
    tensors = lora_tensors()
    tensors[name_of(Q, "A")] = tensors[name_of(Q, "A")][:3]
    tensors[name_of(Q, "B")] = tensors[name_of(Q, "B")][:, :3]
    config = {
        **LORA_CONFIG,
        "use_rslora": True,
        "rank_pattern": {"proj": 9, "self_attn.q_proj": 3, "q_proj": 8},  # "proj" is no whole component
        "alpha_pattern": {r"layers\.(0|1)\.mlp\.gate_proj": 2, "gate_proj": 5},
    }
    adapter = load_adapter(write(tmp_path, config, tensors))
    assert adapter.modules[Q].layout.rank == 3
    scaling = {path: weights.scaling * math.sqrt(weights.layout.rank) for path, weights in adapter.modules.items()}
    assert scaling == pytest.approx(
        {
            "model.layers.0.mlp.gate_proj": 2,
            "model.layers.10.mlp.gate_proj": 5,
            "model.layers.0.mlp.down_proj": 6,
            Q: 6,
        }
    )


def test_names_without_pefts_prefix(tmp_path: Path) -> None:
    with_prefix = load_adapter(write(tmp_path / "a", LORA_CONFIG, lora_tensors()))
    without = load_adapter(write(tmp_path / "b", LORA_CONFIG, lora_tensors(prefix="")))
    assert with_prefix.digest == without.digest


def test_modules_are_listed_in_the_models_order(tmp_path: Path) -> None:
    paths = list(load_adapter(write(tmp_path)).modules)
    assert paths.index("model.layers.2.self_attn.q_proj") < paths.index("model.layers.10.mlp.gate_proj")


def test_tensors_trained_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' files are pickled with the device of the training."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    folder = write(tmp_path / "a", CONFIG, hydra_tensors(), binary=True)
    assert b"cuda:0" in (folder / "adapter_model.bin").read_bytes()
    assert load_adapter(folder).digest == load_adapter(write(tmp_path / "b")).digest


def test_parameters_and_views_in_a_bin_file(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {n: torch.nn.Parameter(t) for n, t in hydra_tensors().items()}
    tensors[name_of(Q, "B0")] = torch.randn(40, 12).T[:, ::10]  # neither contiguous nor alone in its storage
    adapter = load_adapter(write(tmp_path, CONFIG, tensors, binary=True))
    weights = adapter.modules[Q]
    assert torch.equal(weights.b[0], tensors[name_of(Q, "B0")])
    assert weights.b.is_contiguous()
    assert not weights.a.requires_grad
    assert weights.a.untyped_storage().nbytes() == weights.a.nbytes


def test_unknown_harmless_fields_are_ignored(tmp_path: Path) -> None:
    config = {
        **CONFIG,
        "blc_alpha": 0.1,
        "blc_weight": 0.2,
        "peft_version": "0.21.2",
        "loftq_config": {},
        "revision": "x",
    }
    assert load_adapter(write(tmp_path, config)).digest == load_adapter(write(tmp_path / "b")).digest


def test_a_config_with_a_byte_order_mark_is_json_too(tmp_path: Path) -> None:
    write(tmp_path, b"\xef\xbb\xbf" + json.dumps(CONFIG).encode())
    assert load_adapter(tmp_path).rank == 4
