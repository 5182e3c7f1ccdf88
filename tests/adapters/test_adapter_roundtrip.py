"""Writing and reading give the same adapter, and the authors' layout is written to the letter."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra_kernels import HydraWeights, Layout
from hydra_kernels.testing import random_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from hydraserve.adapters.checkpoint import (
    inspect_adapter,
    load_adapter,
    save_adapter,
    save_hydralora,
    save_lora,
)
from hydraserve.adapters.formats.writing import scaling_fields
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import UnsupportedFeatureError

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
PATHS = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "12", "mlp", "q_proj", "x-y"]), min_size=1, max_size=5
).map(".".join)


@st.composite
def weights(draw: st.DrawFn, router: bool) -> HydraWeights:
    layout = Layout(rank=draw(st.integers(1, 9)), heads=draw(st.integers(1, 6)) if router else 1, has_router=router)
    made = random_weights(
        draw(st.integers(1, 12)), draw(st.integers(1, 12)), layout, draw(DTYPES), seed=draw(st.integers(0, 9))
    )
    return replace(made, scaling=draw(st.floats(0.01, 1000)) / layout.rank)


def adapters(router: bool) -> st.SearchStrategy[HydraAdapter]:
    modules = st.dictionaries(PATHS, weights(router), min_size=1, max_size=5)
    return st.builds(lambda m, base: HydraAdapter.of(m, base_model=base), modules, st.none() | st.text(max_size=8))


def assert_same(a: HydraAdapter, b: HydraAdapter) -> None:
    assert a.digest == b.digest
    assert (a.format, a.base_model, a.nbytes) == (b.format, b.base_model, b.nbytes)
    assert set(a.modules) == set(b.modules)
    for path, left in a.modules.items():
        right = b.modules[path]
        assert (left.layout, left.scaling) == (right.layout, right.scaling)
        for x, y in ((left.a, right.a), (left.b, right.b), (left.router, right.router)):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                assert x.dtype == y.dtype
                assert torch.equal(x, y)


@settings(max_examples=25, deadline=None)
@given(adapter=adapters(router=True), safetensors=st.booleans())
def test_hydralora_comes_back(adapter: HydraAdapter, safetensors: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_hydralora(adapter, folder, safetensors=safetensors)
        assert_same(load_adapter(folder), adapter)
        summary = inspect_adapter(folder)
        assert (summary.nbytes, summary.capacity) == (adapter.nbytes, adapter.capacity)


@settings(max_examples=25, deadline=None)
@given(adapter=adapters(router=False), safetensors=st.booleans())
def test_lora_comes_back(adapter: HydraAdapter, safetensors: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_lora(adapter, folder, safetensors=safetensors)
        assert_same(load_adapter(folder), adapter)


@settings(max_examples=100, deadline=None)
@given(rank=st.integers(1, 1024), alpha=st.floats(1e-6, 1e6) | st.integers(1, 4096).map(float))
def test_every_scaling_that_training_makes_is_kept(rank: int, alpha: float) -> None:
    for scaling in (alpha / rank, alpha / math.sqrt(rank)):
        made = HydraWeights(torch.zeros(rank, 1), torch.zeros(1, 1, rank), Layout(rank), scaling=scaling)
        fields = scaling_fields(HydraAdapter.of({"up_proj": made}), rank_stabilized=True)
        divisor = math.sqrt(rank) if fields["use_rslora"] else rank
        assert fields["lora_alpha"] / divisor == scaling
    assert scaling_fields(HydraAdapter.of({"up_proj": made}), rank_stabilized=False)["use_rslora"] is False


def hydra(rank: int = 2, heads: int = 3, seed: int = 0) -> HydraWeights:
    return random_weights(6, 8, Layout(rank, heads, has_router=True), torch.bfloat16, seed)


def test_the_authors_files_to_the_letter(tmp_path: Path) -> None:
    gate, up = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
    adapter = HydraAdapter.of({gate: hydra(seed=1), up: hydra(seed=2)}, base_model="org/base")
    save_hydralora(adapter, tmp_path, lora_dropout=0.05)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.bin"]
    assert (tmp_path / "adapter_config.json").read_text() == (
        """{
  "base_model_name_or_path": "org/base",
  "bias": "none",
  "enable_lora": null,
  "fan_in_fan_out": false,
  "inference_mode": true,
  "lora_alpha": 4.0,
  "lora_dropout": 0.05,
  "lora_nums": 3,
  "merge_weights": false,
  "modules_to_save": null,
  "peft_type": "LORA",
  "r": 2,
  "target_modules": [
    "gate_proj",
    "up_proj"
  ],
  "task_type": "CAUSAL_LM"
}"""
    )
    tensors = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    parts = ["lora_route", "lora_A", "lora_B0", "lora_B1", "lora_B2"]
    assert list(tensors) == [f"base_model.model.{path}.{part}.weight" for path in (gate, up) for part in parts]
    assert [tuple(t.shape) for t in tensors.values()][:5] == [(3, 6), (2, 6), (8, 2), (8, 2), (8, 2)]
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors.values()), "no head drags the others along"


def test_the_authors_own_adapter_is_written_as_it_was(tmp_path: Path, oracle: Path) -> None:
    source = oracle / "adapters" / "mlp_r2_e2"
    adapter = load_adapter(source)
    save_hydralora(adapter, tmp_path, lora_dropout=0.05)
    ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, source))
    assert sorted(ours.pop("target_modules")) == sorted(theirs.pop("target_modules"))
    assert ours == theirs
    saved, original = (
        torch.load(folder / "adapter_model.bin", weights_only=True, map_location="cpu") for folder in (tmp_path, source)
    )
    assert list(saved) == list(original)
    for name, tensor in original.items():
        assert saved[name].dtype == tensor.dtype
        assert torch.equal(saved[name], tensor)
    assert load_adapter(tmp_path).digest == adapter.digest


def test_layers_that_differ_are_declared(tmp_path: Path) -> None:
    adapter = HydraAdapter.of({"m.0.q": hydra(), "m.1.q": hydra(4, 2), "m.2.q": hydra(), "x.m.1.q": hydra()})
    save_hydralora(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_nums"], config["lora_alpha"]) == (2, 3, 4.0)
    assert config["rank_pattern"] == {r"^m\.1\.q": 4}, "not the module x.m.1.q"
    assert config["lora_nums_pattern"] == {r"^m\.1\.q": 2}
    assert config["alpha_pattern"] == {r"^m\.1\.q": 8.0}
    assert_same(load_adapter(tmp_path), adapter)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (Layout(2, 3, has_router=False), "no router"),
        (Layout(2, 3, shared_a=False, has_router=True), "one A for each head"),
        (Layout(2, 3, top_k=1, has_router=True), "top-1"),
        (Layout(2, 3, has_router=True, has_bias=True), "bias"),
    ],
    ids=str,
)
def test_what_the_layout_has_no_place_for(tmp_path: Path, layout: Layout, text: str) -> None:
    good = hydra()
    bad = random_weights(6, 8, layout, torch.float32)
    for save in (save_hydralora, save_lora):
        with pytest.raises(UnsupportedFeatureError, match=r"module (good|bad)\.q"):
            save(HydraAdapter.of({"good.q": good, "bad.q": bad}), tmp_path / "out")
    with pytest.raises(UnsupportedFeatureError, match=text):
        save_hydralora(HydraAdapter.of({"good.q": good, "bad.q": bad}), tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_saving_over_another_adapter_leaves_nothing_of_it(tmp_path: Path) -> None:
    old, new = (HydraAdapter.of({"m.q": hydra(seed=seed)}) for seed in (1, 2))
    save_hydralora(old, tmp_path, safetensors=True)
    save_hydralora(new, tmp_path)
    assert load_adapter(tmp_path).digest == new.digest
    save_hydralora(old, tmp_path, safetensors=True)
    assert load_adapter(tmp_path).digest == old.digest
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_is_no_adapter_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hydralora(HydraAdapter.of({"m.q": hydra(seed=1)}), tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_hydralora(HydraAdapter.of({"m.q": hydra(seed=2)}), tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()


def test_save_adapter_takes_the_layout_of_the_format(tmp_path: Path) -> None:
    plain = HydraAdapter.of({"m.q": random_weights(6, 8, Layout(2), torch.float32)})
    for adapter in (plain, HydraAdapter.of({"m.q": hydra()})):
        save_adapter(adapter, tmp_path / adapter.format)
        assert_same(load_adapter(tmp_path / adapter.format), adapter)
