"""HydraLoRA as an ordinary PEFT method: save, load, several adapters, patterns, merging, registration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hydraserve.tuner import HydraLoraConfig, HydraLoraModel, record_routing
from hydraserve.tuner.errors import MergeError
from hydraserve.tuner.register import register

TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()


def config(**options: object) -> HydraLoraConfig:
    defaults = {"r": 4, "num_heads": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return HydraLoraConfig(**defaults | {"init_weights": False} | options)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def test_save_and_load_give_the_same_model(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(num_heads_pattern={"layers.1.*down_proj": 2}))
    expected = logits(model)
    assert not torch.allclose(expected, logits(tiny_llama()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    low_memory = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(low_memory), expected)


def test_saved_files(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), config()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["num_heads"]) == ("HYDRALORA", 4, 3)
    assert saved["target_modules"] == ["down_proj", "q_proj"]
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    prefix = "base_model.model.model.layers.1.mlp.down_proj.hydralora_"
    assert {key: shape for key, shape in shapes.items() if key.startswith(prefix)} == {
        f"{prefix}A.weight": (4, 48),
        f"{prefix}B.weight": (3, 32, 4),
        f"{prefix}router.weight": (3, 48),
    }
    assert len(shapes) == 3 * 4
    assert isinstance(PeftConfig.from_pretrained(tmp_path), HydraLoraConfig)


def test_several_adapters() -> None:
    model = get_peft_model(tiny_llama(), config())
    base, first = logits(tiny_llama()), logits(model)
    model.add_adapter("second", config(r=2, num_heads=5, target_modules=["q_proj", "up_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(second, first)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".second." in name for name in trainable)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any("second" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model.unload()), base)


def test_an_adapter_for_each_row_is_refused() -> None:
    model = get_peft_model(tiny_llama(), config())
    with pytest.raises(ValueError, match="adapter_names: got an adapter for each row"):
        model(input_ids=TOKENS, adapter_names=["default", "default"])
    model(input_ids=TOKENS, adapter_names=None)


def test_two_active_adapters_add_up() -> None:
    model = get_peft_model(tiny_llama(), config())
    model.add_adapter("second", config())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(3, 32)
    expected = layer.base_layer(x) + layer.delta(x, "default") + layer.delta(x, "second")
    torch.testing.assert_close(layer(x), expected)


def test_patterns_and_scaling() -> None:
    options = {"rank_pattern": {"layers.0.*q_proj": 2}, "alpha_pattern": {"down_proj": 5.0}}
    model = get_peft_model(tiny_llama(), config(lora_alpha=8, num_heads_pattern={"q_proj": 6}, **options))
    layers = model.base_model.model.model.layers
    q0, q1, down = layers[0].self_attn.q_proj, layers[1].self_attn.q_proj, layers[1].mlp.down_proj
    assert [m.r["default"] for m in (q0, q1, down)] == [2, 4, 4]
    assert [m.num_heads["default"] for m in (q0, q1, down)] == [6, 6, 3]
    assert [m.scaling["default"] for m in (q0, q1, down)] == [4.0, 2.0, 1.25]
    rs = get_peft_model(tiny_llama(), config(lora_alpha=8, use_rslora=True))
    assert rs.base_model.model.model.layers[0].mlp.down_proj.scaling["default"] == 4.0


def test_pattern_without_a_match_warns() -> None:
    with pytest.warns(UserWarning, match=r"num_heads_pattern keys did not match.*lm_head"):
        get_peft_model(tiny_llama(), config(num_heads_pattern={"lm_head": 2, "q_proj": 2}))


def test_target_modules_by_default_and_all_linear() -> None:
    default = get_peft_model(tiny_llama(), config(target_modules=None))
    assert set(default.peft_config["default"].target_modules) == {"q_proj", "v_proj"}  # as PEFT's LoRA for Llama
    everything = get_peft_model(tiny_llama(), config(target_modules="all-linear"))
    assert len(everything.base_model.targeted_module_names) == 2 * 7


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "unmerge_adapter"])
def test_merging_says_why_not(call: str) -> None:
    model = get_peft_model(tiny_llama(), config())
    expected = logits(model)
    with pytest.raises(MergeError, match="router mixes the heads anew for every token"):
        getattr(model, call)()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r: got 0, expected a whole number of at least 1"),
        ({"r": 2.5}, "r: got 2.5"),
        ({"r": True}, "r: got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha: got nan, expected more than 0"),
        ({"lora_alpha": -1}, "lora_alpha: got -1"),
        ({"alpha_pattern": {"q_proj": 0.0}}, r"alpha_pattern\['q_proj'\]: got 0.0"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, r"rank_pattern: got the key '\(\?i\)q_proj', expected at most 256"),
        ({"alpha_pattern": {"q_{1,2}": 2.0}}, r"alpha_pattern: got the key 'q_\{1,2\}'"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [0]},
            r"layers_to_transform: got \[0\] with target_modules=",
        ),
        ({"target_modules": "all-linear", "layers_to_transform": 1}, "layers_to_transform: got 1 with target_modules="),
        ({"num_heads": 0}, "num_heads: got 0"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]: got 0"),
        ({"num_heads_pattern": {"q_proj": -1}}, r"num_heads_pattern\['q_proj'\]: got -1"),
        ({"lora_dropout": 1.0}, "lora_dropout: got 1.0"),
        ({"router_z_coef": -0.1}, "router_z_coef: got -0.1"),
    ],
)
def test_config_refuses_impossible_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    grads, recorded = [], []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(tiny_llama(), config(load_balance_coef=0.5, router_z_coef=0.1)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with record_routing(model) as routing:
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        recorded.append(routing.weights)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert [{len(passes) for passes in weights.values()} for weights in recorded] == [{1}, {1}]
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], msg=name)


def test_generate_with_cache_matches_full_forward() -> None:
    model = get_peft_model(tiny_llama(), config())
    model.eval()
    generated = model.generate(input_ids=TOKENS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        expected = model(input_ids=generated[:, :-1]).logits.argmax(-1)[:, -4:]
    assert torch.equal(generated[:, -4:], expected)


def test_registration_is_repeatable_and_leaves_lora_alone() -> None:
    register(HydraLoraConfig, HydraLoraModel)
    assert PeftType("HYDRALORA") is PeftType.HYDRALORA
    assert PeftType.HYDRALORA in list(PeftType)
    assert PeftType.HYDRALORA == "HYDRALORA"
    assert PeftType.HYDRALORA.value == PeftType.HYDRALORA.name == "HYDRALORA"

    class Other(HydraLoraConfig):
        pass

    with pytest.raises(ImportError, match="got a method named hydralora"):
        register(Other, HydraLoraModel)
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    assert model.peft_config["default"].peft_type == PeftType.LORA
