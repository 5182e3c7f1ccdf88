"""The tuner's files: read by the server, and converted to the authors' layout and back without loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra_kernels import Layout, reference
from hydra_kernels.testing import random_weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hydraserve.adapters.checkpoint import inspect_adapter, load_adapter, save_hydralora, save_lora
from hydraserve.adapters.formats.peft import save_peft
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import AdapterConfigError, AdapterError, MissingTensorError, ShapeError, UnsupportedFeatureError
from hydraserve.tuner import HydraLoraConfig, record_routing


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter with patterns and rsLoRA, as PEFT saves it."""
    config = HydraLoraConfig(
        r=4, num_heads=3, lora_alpha=12, use_rslora=True, target_modules=["q_proj", "down_proj"], init_weights=False,
        rank_pattern={"q_proj": 2}, num_heads_pattern={r"layers.1.*down_proj": 5},
        alpha_pattern={"layers.0.mlp.down_proj": 7.0},
    )  # fmt: skip
    torch.manual_seed(1)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_server_reads_what_peft_saves(saved: Path) -> None:
    adapter = load_adapter(saved)
    summary = inspect_adapter(saved)
    assert adapter.format == summary.format == "hydralora-peft"
    assert {path: weights.layout for path, weights in adapter.modules.items()} == {
        "model.layers.0.self_attn.q_proj": Layout(2, 3, has_router=True),
        "model.layers.0.mlp.down_proj": Layout(4, 3, has_router=True),
        "model.layers.1.self_attn.q_proj": Layout(2, 3, has_router=True),
        "model.layers.1.mlp.down_proj": Layout(4, 5, has_router=True),
    }
    assert {path: module.layout for path, module in summary.modules.items()} == {
        path: weights.layout for path, weights in adapter.modules.items()
    }
    layers = PeftModel.from_pretrained(tiny_llama(), saved).base_model.model.model.layers
    for path, weights in adapter.modules.items():
        layer = layers[int(path.split(".")[2])].get_submodule(path.partition("layers.")[2][2:])
        x = torch.randn(5, weights.in_features)
        torch.testing.assert_close(layer.delta(x, "default"), reference.delta(x, weights))
    assert adapter.modules["model.layers.0.mlp.down_proj"].scaling == 7.0 / 2


def assert_same(one: HydraAdapter, other: HydraAdapter) -> None:
    assert one.modules.keys() == other.modules.keys()
    for path, weights in one.modules.items():
        assert weights.layout == other.modules[path].layout
        assert weights.scaling == other.modules[path].scaling
        for name in ("a", "b", "router"):
            got, expected = getattr(other.modules[path], name), getattr(weights, name)
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected), f"{path} {name}"
    assert one.digest == other.digest


def test_to_the_authors_layout_and_back(saved: Path, tmp_path: Path) -> None:
    adapter = load_adapter(saved)
    save_hydralora(adapter, tmp_path / "authors")
    authors = load_adapter(tmp_path / "authors")
    assert authors.format == "hydralora"
    assert_same(adapter, authors)
    save_peft(authors, tmp_path / "back")
    assert_same(adapter, load_adapter(tmp_path / "back"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_peft_is_what_peft_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    layouts = [Layout(3, 4, has_router=True), Layout(5, 2, has_router=True)]
    modules = {
        f"model.layers.{i}.mlp.up_proj": random_weights(32, 48, layout, dtype, seed=i)
        for i, layout in enumerate(layouts)
    }
    adapter = HydraAdapter.of(modules, base_model="someone/base")
    save_peft(adapter, tmp_path)
    assert_same(adapter, load_adapter(tmp_path))
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert model.peft_config["default"].base_model_name_or_path == "someone/base"
    for i, (path, weights) in enumerate(modules.items()):
        layer = model.base_model.model.model.layers[i].mlp.up_proj
        x = torch.randn(5, 32)
        torch.testing.assert_close(layer.delta(x, "default"), reference.delta(x, weights), msg=path)


@pytest.mark.parametrize("kind", [HydraLoraConfig, LoraConfig])
def test_layers_without_an_adapter_stay_without(tmp_path: Path, kind: type[HydraLoraConfig | LoraConfig]) -> None:
    config = kind(target_modules=["q_proj", "down_proj"], layers_to_transform=[0])
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "saved")
    (save_peft if kind is HydraLoraConfig else save_lora)(load_adapter(tmp_path / "saved"), tmp_path / "back")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "back")
    layers = model.base_model.targeted_module_names
    assert sorted(layers) == ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    load_adapter(tmp_path / "back")


def test_what_the_tuner_cannot_hold_is_not_written(tmp_path: Path) -> None:
    for layout in (Layout(2, 1), Layout(2, 3, top_k=1, has_router=True), Layout(2, 3, shared_a=False, has_router=True)):
        adapter = HydraAdapter.of({"model.layers.0.mlp.up_proj": random_weights(32, 48, layout, torch.float32)})
        with pytest.raises(UnsupportedFeatureError, match=r"model\.layers\.0\.mlp\.up_proj: got Layout"):
            save_peft(adapter, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def rewrite(folder: Path, change: object) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


KEY = "base_model.model.model.layers.0.mlp.down_proj.hydralora_"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(f"{KEY}router.weight"), MissingTensorError, r"down_proj\.hydralora_router\.weight: got only"),
        (lambda t: t.update({f"{KEY}B.weight": t[f"{KEY}B.weight"][:2]}), ShapeError, r"got shape \[2, 32, 4\]"),
        (lambda t: t.update({f"{KEY}B.weight": t[f"{KEY}B.weight"][0]}), ShapeError, r"got shape \[32, 4\]"),
        (lambda t: t.update({f"{KEY}A.weight": t[f"{KEY}A.weight"][:, :7].clone()}), ShapeError, r"expected \[3, 7\]"),
        (lambda t: t[f"{KEY}A.weight"].fill_(float("nan")), AdapterError, "not finite"),
    ],
)
def test_faulty_tensors(saved: Path, change: object, error: type[AdapterError], message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(error, match=message):
        load_adapter(saved)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_heads": 0}, AdapterConfigError, "num_heads"),
        ({"num_heads": 4}, ShapeError, "num_heads in adapter_config.json"),
        ({"r": None}, AdapterConfigError, "^.*r: got"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedFeatureError, "modules_to_save"),
        ({"target_modules": ["q_proj"]}, AdapterConfigError, "target_modules"),
    ],
)
def test_faulty_config(saved: Path, fields: dict[str, object], error: type[AdapterError], message: str) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(error, match=message):
        load_adapter(saved)


def test_a_fork_with_the_same_peft_type_is_not_taken_for_ours(saved: Path) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    renamed = {key.replace("hydralora_B", "lora_B.0").replace("hydralora_", "lora_"): t for key, t in tensors.items()}
    save_file(renamed, saved / "adapter_model.safetensors")
    with pytest.raises(UnsupportedFeatureError):
        load_adapter(saved)


@pytest.fixture(scope="module")
def oracle_model(oracle: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    """The authors' adapter in the tuner, by way of our save format, on the base it was trained on, in float32."""
    folder = tmp_path_factory.mktemp("oracle")
    adapter = load_adapter(oracle / "adapters" / "mlp_r2_e2")
    save_peft(adapter, folder)
    assert_same(adapter, load_adapter(folder))
    base = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).eval()


def test_log_probabilities_are_those_of_the_authors_code(oracle: Path, oracle_model: PeftModel) -> None:
    expected = json.loads((oracle / "expected" / "mlp_r2_e2.json").read_text())["results"]["float32"]
    for case in expected[:4]:
        prompt, answer = case["prompt_token_ids"], case["generated_token_ids"]
        with torch.no_grad():
            logits = oracle_model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        got = logits.log_softmax(-1)
        for step, recorded in enumerate(case["steps"]):
            top = torch.tensor(recorded["top20_logprobs"])
            # 3e-4: the recorded code itself differs by 7e-5 between its cached and its full forward pass.
            torch.testing.assert_close(
                got[step][recorded["top20_ids"]], top, rtol=0, atol=3e-4, msg=f"{case['name']} {step}"
            )


def test_routing_is_that_of_the_authors_code(oracle: Path, oracle_model: PeftModel) -> None:
    with np.load(oracle / "expected" / "mlp_r2_e2.routing.npz") as recorded:
        for prompt in ("arith_add", "json_1"):
            tokens = torch.from_numpy(recorded[f"{prompt}/token_ids"])
            with torch.no_grad(), record_routing(oracle_model) as routing:
                oracle_model(input_ids=tokens[None])
            assert len(routing.weights) == 90
            for path, (weights,) in routing.weights.items():
                expected = torch.from_numpy(recorded[f"{prompt}/{path.removeprefix('model.')}"])
                torch.testing.assert_close(weights[0], expected, rtol=0, atol=2e-5, msg=f"{prompt} {path}")


def test_layers_are_the_authors_formula_with_its_gradients(oracle: Path, oracle_model: PeftModel) -> None:
    """Head by head, from the tensors of the authors' file as they lie there, to 1e-5 of the output's size."""
    folder = oracle / "adapters" / "mlp_r2_e2"
    tensors = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    saved = json.loads((folder / "adapter_config.json").read_text())
    scaling = saved["lora_alpha"] / saved["r"]
    torch.manual_seed(0)
    for path in ("model.layers.0.mlp.gate_proj", "model.layers.14.mlp.up_proj", "model.layers.29.mlp.down_proj"):
        layer = oracle_model.base_model.model.get_submodule(path)
        names = ["lora_route", "lora_A", *(f"lora_B{i}" for i in range(saved["lora_nums"]))]
        weights = [tensors[f"base_model.model.{path}.{name}.weight"].float().requires_grad_() for name in names]
        route, a, *heads = weights
        x = torch.randn(2, 7, layer.in_features, requires_grad=True)
        expected = layer.base_layer(x)
        shares = torch.softmax(torch.nn.functional.linear(x, route), dim=-1, dtype=torch.float32)
        for i, b in enumerate(heads):
            delta = torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)
            expected = expected + shares[:, :, i, None] * delta * scaling
        parts = layer.parts("default")
        ours = [p.weight.requires_grad_() for p in (parts.router, parts.a, parts.b)]
        got = layer(x)
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max(), path
        upstream = torch.randn_like(expected)
        d_route, d_a, *d_heads, d_x = torch.autograd.grad((expected * upstream).sum(), [*weights, x])
        gradients = torch.autograd.grad((got * upstream).sum(), [*ours, x])
        for g, e in zip(gradients, (d_route, d_a, torch.stack(d_heads), d_x), strict=True):
            assert (g - e).abs().max() < 1e-5 * e.abs().max(), path
