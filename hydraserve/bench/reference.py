"""The authors' computation of HydraLoRA in Hugging Face transformers: what users of their code have today.

`python -m hydraserve.bench.reference --model PATH --adapter NAME=PATH ...` loads everything once, then reads one
request a line from stdin and answers each with one line on stdout, both JSON:

    {"prompts": [[int]], "adapter": NAME, "output_tokens": int}  ->  {"times": [float]}

times: when each of the output tokens came, for all prompts at once, by time.perf_counter (one clock for all processes
on Linux). All prompts have one length.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra_kernels import HydraWeights

from hydraserve.adapters.checkpoint import load_adapter

# vLLM's --dtype. For "auto", what vLLM takes for a model saved in bfloat16 or float32.
DTYPES = {
    "auto": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    **dict.fromkeys(("half", "float16"), torch.float16),
    **dict.fromkeys(("float", "float32"), torch.float32),
}


class PerHeadLinear(torch.nn.Module):
    """A linear layer with HydraLoRA as the authors compute it: A x anew for each head, summed head by head.

        route  = softmax(R x) in float32, cast back
        result = W x + b;  for each head:  result = result + route_i * B_i(A x) * s

    x: [batch, tokens, in]. All in the base's dtype. Source: Clin0212/HydraLoRA, the layer's forward pass; without
    dropout, as in inference.
    """

    def __init__(self, base: torch.nn.Linear, adapters: Mapping[str, HydraWeights]) -> None:
        super().__init__()
        self.base = base
        dtype = base.weight.dtype
        self.adapters = {name: weights.to(dtype) for name, weights in adapters.items()}
        self.active: str | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(x)
        weights = self.adapters.get(self.active) if self.active is not None else None
        if weights is None:
            return result
        linear = torch.nn.functional.linear
        if weights.router is None:  # an ordinary LoRA adapter
            return result + linear(linear(x, weights.a), weights.b[0]) * weights.scaling
        route = torch.softmax(linear(x, weights.router), dim=-1, dtype=torch.float32).to(result.dtype)
        for i, head in enumerate(weights.b):
            result = result + route[:, :, i, None] * linear(linear(x, weights.a), head) * weights.scaling
        return result


class PerHeadModel:
    """A causal language model whose adapted layers are PerHeadLinear."""

    def __init__(self, model: str, adapters: Mapping[str, Path], dtype: torch.dtype = torch.bfloat16) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        loaded = {name: load_adapter(path) for name, path in adapters.items()}
        self.layers: list[PerHeadLinear] = []
        for path in sorted({path for adapter in loaded.values() for path in adapter.modules}):
            parent, _, name = path.rpartition(".")
            weights = {n: adapter.modules[path] for n, adapter in loaded.items() if path in adapter.modules}
            layer = PerHeadLinear(self.model.get_submodule(path), weights)
            setattr(self.model.get_submodule(parent), name, layer)
            self.layers.append(layer)

    def select(self, adapter: str | None) -> None:
        """Use this adapter from now on, None: the base model. Their code holds one at a time, and so does this."""
        for layer in self.layers:
            layer.active = adapter

    @torch.inference_mode()
    def generate(self, prompts: torch.Tensor, output_tokens: int) -> list[float]:
        """Greedy tokens for prompts [batch, tokens], through transformers' generate; when each of them was there."""
        times: list[float] = []

        def clock(ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool)  # never done before the length is reached

        self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=output_tokens,
            max_new_tokens=output_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        return times


def build(arguments: Sequence[str] | None = None) -> PerHeadModel:
    """The model that this process's arguments, or these, ask for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="in vLLM's words")
    args = parser.parse_args(arguments)
    adapters = dict(text.split("=", 1) for text in args.adapter)
    return PerHeadModel(args.model, {name: Path(path) for name, path in adapters.items()}, DTYPES[args.dtype])


def main() -> None:
    model = build()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        model.select(request["adapter"])
        times = model.generate(torch.tensor(request["prompts"]), request["output_tokens"])
        print(json.dumps({"times": times}), flush=True)


if __name__ == "__main__":
    main()
