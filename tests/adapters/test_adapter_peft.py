"""Ordinary LoRA against PEFT itself: what it saves is what we load, what we save is what it loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra_kernels import reference

from hydraserve.adapters.checkpoint import check_base, inspect_adapter, load_adapter, save_lora
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import UnsupportedFeatureError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT looks for the base model's config on the Hub when it saves."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
    )
    return transformers.LlamaForCausalLM(config).eval()


def base_shapes(model: Any) -> dict[str, tuple[int, int]]:
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def logits_with(adapter: HydraAdapter, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The base with our delta added at every adapted layer."""

    def add(path: str) -> Any:
        weights = adapter.modules[path]

        def hook(_: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            return output + reference.delta(x.reshape(-1, x.shape[-1]), weights).view_as(output)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(add(path)) for path in adapter.modules]
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    for handle in handles:
        handle.remove()
    return result


IDS = torch.tensor([[1, 5, 7, 9, 11, 2, 3]])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 6},
        {"target_modules": "all-linear", "r": 3, "use_rslora": True},
        {"target_modules": r".*layers\.1.*_proj", "r": 2, "lora_alpha": 1},
        {
            "target_modules": ["q_proj", "k_proj", "gate_proj"],
            "r": 4,
            "lora_alpha": 4,
            "rank_pattern": {r"layers.0.*.q_proj": 2, "q_proj": 5},
            "alpha_pattern": {"^model.layers.1.self_attn.k_proj": 9, "gate_proj": 1},
        },
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "r": 2, "init_lora_weights": "gaussian"},
    ],
    ids=["two modules", "all rslora", "regex", "patterns", "one layer"],
)
def test_what_peft_saves_computes_the_same_here(base: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
        expected = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    plain = model.unload()
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.format == "lora"
    check_base(adapter, base_shapes(plain))
    assert (logits_with(adapter, plain, IDS) - plain(IDS).logits).abs().max() > 0.1, "the adapter must matter"
    torch.testing.assert_close(logits_with(adapter, plain, IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("rank", [4, [2, 5, 3]], ids=["uniform", "mixed"])
def test_what_we_save_computes_the_same_in_peft(base: Any, tmp_path: Path, rank: Any, safetensors: bool) -> None:
    shapes = {path: shape for path, shape in base_shapes(base).items() if "lm_head" not in path}
    adapter = make_adapter(shapes, ["q_proj", "up_proj"], rank, 1, seed=3, alpha=7, strength=0.5)
    save_lora(adapter, tmp_path, safetensors=safetensors)
    expected = logits_with(adapter, base, IDS)
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_saves_and_we_cannot_serve(base: Any, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], "r": 2, **options})
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFeatureError, match=text):
        inspect_adapter(tmp_path)


def test_our_config_is_one_that_peft_would_write(base: Any, tmp_path: Path) -> None:
    shapes = {path: shape for path, shape in base_shapes(base).items() if "lm_head" not in path}
    save_lora(make_adapter(shapes, rank=2, heads=1), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(fields) <= set(peft.LoraConfig().to_dict()) | {"peft_type"}
