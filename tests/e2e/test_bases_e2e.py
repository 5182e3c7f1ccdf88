"""Bases of other shapes and number types: fused projections in float16, with prompts cut into chunks, and a quantised
one. What adapters do to them is compared with the authors' formula in transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import openai
import pytest
import torch
from engines import one_process_engine
from safetensors.torch import load_file, save_file
from transformers import Phi3Config, Phi3ForCausalLM

from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.bench.reference import PerHeadModel
from hydraserve.models import base_shapes

ADAPTERS = {"r4-e3": (4, 3), "r8-e4": (8, 4), "plain-r8": (8, 1)}  # rank, heads
CHUNK = 16  # tokens that a step computes, less than any prompt has
PROMPTS = [[(7 * i + 3 * shift) % 400 + 20 for i in range(50 + shift)] for shift in (0, 5)]
TOKENS = 8
# Nats, from the same formula in float32: 0.04 were found, and these random layers amplify each rounding.
FLOAT16_LIMIT = 0.1


@dataclass(frozen=True)
class Served:
    """A base, its adapters, and a client of a server with both."""

    base: Path
    adapters: Mapping[str, Path]
    client: openai.OpenAI

    def complete(self, model: str, prompt: Sequence[int]) -> tuple[list[int], list[dict[int, float]]]:
        """Greedy tokens, and for each step the log-probabilities of the most likely ones."""
        answer = self.client.completions.create(
            model=model,
            prompt=list(prompt),
            max_tokens=TOKENS,
            temperature=0,
            logprobs=5,
            extra_body={"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True},
        ).choices[0]
        assert answer.logprobs is not None
        assert answer.logprobs.top_logprobs is not None
        steps = [
            {int(token.removeprefix("token_id:")): value for token, value in step.items()}
            for step in answer.logprobs.top_logprobs
        ]
        return list(answer.token_ids), steps  # type: ignore[attr-defined]

    def all_at_once(self) -> dict[tuple[str, int], tuple[list[int], list[dict[int, float]]]]:
        """(model, number of the prompt) -> answer, all in one batch."""
        wanted = [(model, i) for model in ("base", *self.adapters) for i in range(len(PROMPTS))]
        with ThreadPoolExecutor(len(wanted)) as pool:
            return dict(zip(wanted, pool.map(lambda w: self.complete(w[0], PROMPTS[w[1]]), wanted), strict=True))


@contextmanager
def served(base: Path, shapes: Mapping[str, tuple[int, int]], folder: Path, *flags: str) -> Iterator[Served]:
    arguments = ["--model", str(base), "--served-model-name", "base", "--enforce-eager", "--max-model-len", "128"]
    adapters = {}
    for seed, (name, (rank, heads)) in enumerate(ADAPTERS.items()):
        adapters[name] = folder / name
        save_adapter(
            make_adapter({k: v for k, v in shapes.items() if k != "lm_head"}, None, rank, heads, seed), adapters[name]
        )
        arguments += ["--adapter", f"{name}={adapters[name]}"]
    with one_process_engine([*arguments, *flags], folder / "log") as process:
        yield Served(base, adapters, openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", timeout=120))


def differences(found: Served, reference: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """(model that answered, adapter of the formula) -> largest and mean difference of a log-probability from the
    formula's, computed in float32."""
    model = PerHeadModel(str(reference), found.adapters, torch.float32)
    differing: dict[tuple[str, str], list[float]] = {}
    for (name, i), (tokens, steps) in found.all_at_once().items():
        for adapter in ("base", *found.adapters):
            model.select(None if adapter == "base" else adapter)
            with torch.inference_mode():
                logits = model.model(torch.tensor([PROMPTS[i] + tokens])).logits[0, len(PROMPTS[i]) - 1 :]
            expected = torch.log_softmax(logits.float(), dim=-1)
            differing.setdefault((name, adapter), []).extend(
                abs(value - float(row[token]))
                for step, row in zip(steps, expected, strict=False)
                for token, value in step.items()
            )
    return {pair: (max(values), mean(values)) for pair, values in differing.items()}


def tiny_phi3(tokenizer: Path, folder: Path) -> Path:
    """Random weights in float16, q, k and v in one layer, gate and up in another; the tiny Llama's tokenizer."""
    config = Phi3Config(
        **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512, "pad_token_id": 2},
        **{"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Phi3ForCausalLM(config).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text((tokenizer / name).read_text())
    return folder


@pytest.mark.long
def test_fused_projections_in_float16_with_prompts_in_chunks(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("phi3")
    base = tiny_phi3(tiny_llama, folder / "base")
    shapes = base_shapes(base)
    assert {"model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"} < set(shapes)
    flags = ["--dtype", "float16", "--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "8"]
    with served(base, shapes, folder, *flags) as found:
        alone = {name: found.complete(name, PROMPTS[0])[0] for name in ("base", *ADAPTERS)}
        assert len({tuple(tokens) for tokens in alone.values()}) == len(alone), "every adapter changes the tokens"
        found_differences = differences(found, base)
    for name in alone:
        assert found_differences[name, name][0] < FLOAT16_LIMIT


def quantised(source: Path, folder: Path) -> tuple[Path, Path]:
    """(checkpoint with linear layers in 8 bits, the same weights in float32): a scale for each output; inputs are
    quantised as they come."""
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    packed, rounded = {}, {}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            packed[name] = rounded[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        packed[name] = torch.round(weight / scale).to(torch.int8)
        packed[f"{name}_scale"] = scale
        rounded[name] = packed[name] * scale
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    quantization = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}
    quantization |= {"quantization_status": "compressed", "config_groups": {"group_0": group}}
    for name, tensors, fields in (("int8", packed, {"quantization_config": quantization}), ("float", rounded, {})):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({**config, **fields}))
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            (folder / name / file).write_text((source / file).read_text())
    return folder / "int8", folder / "float"


@pytest.mark.long
def test_a_quantised_base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("quantised")
    base, reference = quantised(tiny_llama, folder)
    with served(base, base_shapes(tiny_llama), folder, "--dtype", "float32", "--max-num-seqs", "8") as found:
        alone = {name: found.complete(name, PROMPTS[0])[0] for name in ("base", *ADAPTERS)}
        assert len({tuple(tokens) for tokens in alone.values()}) == len(alone), "every adapter changes the tokens"
        found_differences = differences(found, reference)
    # Inputs are rounded to 8 bits, and processors without dot products of 8 bits round the sums as well: what is to be
    # seen is that each answer is its own adapter's.
    for name in alone:
        own, *others = (found_differences[name, other][1] for other in (name, *(alone.keys() - {name})))
        assert own < 0.5 * min(others), found_differences
