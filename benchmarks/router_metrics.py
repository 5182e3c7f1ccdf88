"""What `--router-metrics on` costs per output token: writes benchmarks/results/router-metrics.json.

    python benchmarks/router_metrics.py

One engine in this process, so that nothing differs but what is recorded. The time per output token of a batch that only
decodes is the time of a step, so the arms take turns from step to step, and a ratio is taken between neighbours:
whatever else the machine does moves both sides of it.

    none  the kernels know of no probe (CPU operator only)
    off   the default: they look whether something is to be recorded
    on    the step is counted
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from hydraserve.bench.machine import environment, provenance
from hydraserve.bench.result import save
from hydraserve.engine.launch import preload_openmp

OUTPUT = Path(__file__).resolve().parent / "results" / "router-metrics.json"
ARMS = ("none", "off", "on")
BASELINE = "off"
LIMIT = 1.01  # of a step on over off
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 450
WARM_UP_STEPS = 15
RANK, HEADS = 8, 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", default="1,8", help="concurrent requests, each with an adapter of its own")
    parser.add_argument("--runs", type=int, default=8, help=f"of {OUTPUT_TOKENS} steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    if "libiomp" not in os.environ.get("LD_PRELOAD", ""):  # as `hydraserve serve` starts its engine
        preload_openmp()
        if "LD_PRELOAD" in os.environ:
            os.execv(sys.executable, [sys.executable, *sys.argv])
    batches = [int(batch) for batch in args.batch.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(args.model, max(batches), Path(folder))
        cells = [cell(engine, batch, args.runs) for batch in batches]
    about = {"provenance": provenance(), "environment": environment(), "model": args.model}
    workload = {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS, "rank": RANK, "heads": HEADS}
    save({"kind": "router metrics", **about, **workload, "limit": LIMIT, "cells": cells}, args.output)
    for one in cells:
        print(f"batch {one['batch']}: step off {one['step_ms'][BASELINE]['p50']:.2f} ms", end="")
        for arm, ratio in one["ratios"].items():
            low, high = ratio["ci95"]
            print(f", {arm}/{BASELINE} {ratio['median']:.4f} (95%: {low:.4f} to {high:.4f})", end="")
        print(f", {one['steps']} steps of each")
    return 0


def cell(engine: Engine, batch: int, runs: int) -> dict[str, Any]:
    """One batch size: step times by arm, and their ratios to those of the same round of arms."""
    rounds = [r for run in range(runs) for r in engine.rounds(batch, run)]
    steps = {arm: [r[arm] for r in rounds] for arm in ARMS}
    return {
        "batch": batch,
        "steps": len(rounds),
        "step_ms": {arm: percentiles(times) for arm, times in steps.items()},
        "ratios": {arm: ratio([r[arm] / r[BASELINE] for r in rounds]) for arm in ARMS if arm != BASELINE},
    }


def percentiles(times: list[float]) -> dict[str, float]:
    cuts = quantiles(times, n=20)
    return {f"p{p}": round(cuts[p // 5 - 1], 4) for p in (5, 25, 50, 75, 95)}


def ratio(values: list[float]) -> dict[str, Any]:
    """The median, and where it is with a probability of 95%: percentiles of the medians of resamples."""
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(values, (2000, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {"median": round(median(values), 5), "ci95": [round(float(low), 5), round(float(high), 5)]}


class Engine:
    """vLLM in this process, with `batch` random adapters on all linear layers."""

    def __init__(self, model: str, batch: int, folder: Path) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        from hydraserve.adapters.synthetic import make_adapter, save_adapter
        from hydraserve.engine.options import EngineOptions, legal_max_rank
        from hydraserve.models import base_shapes, resolve_model

        base = resolve_model(model)
        shapes = base_shapes(base)
        targets = sorted({path.rpartition(".")[2] for path in shapes} - {"lm_head"})
        self._adapters = []
        for i in range(batch):
            adapter = make_adapter(shapes, targets, RANK, HEADS, seed=i)
            save_adapter(adapter, folder / f"a{i}")
            self._adapters.append(LoRARequest(f"a{i}", i + 1, str(folder / f"a{i}")))
        self._llm = LLM(
            model=base,
            enable_lora=True,
            max_loras=batch,
            max_lora_rank=legal_max_rank(RANK),
            max_num_seqs=batch,
            max_model_len=PROMPT_TOKENS + OUTPUT_TOKENS,
            enable_prefix_caching=False,
            additional_config=EngineOptions(adapter.capacity).to_config(),
        )

        self._llm.collective_rpc(self._take_recorder)

    def _take_recorder(self, worker: Any) -> None:
        self._recorder = worker.model_runner.lora_manager.routing

    def rounds(self, batch: int, seed: int) -> Iterator[dict[str, float]]:
        """For each round of arms, in an order that turns: arm -> milliseconds of its step."""
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=OUTPUT_TOKENS)
        for i in range(batch):
            prompt = {"prompt_token_ids": list(tokens(seed * batch + i))}
            engine.add_request(f"{seed}-{i}", prompt, params, lora_request=self._adapters[i])
        for _ in range(WARM_UP_STEPS):
            engine.step()
        for number in range((OUTPUT_TOKENS - 2 * WARM_UP_STEPS) // len(ARMS)):
            turn = number % len(ARMS)
            yield {arm: self._timed_step(arm) for arm in (*ARMS[turn:], *ARMS[:turn])}
        while engine.has_unfinished_requests():
            engine.step()

    def _timed_step(self, arm: str) -> float:
        self._record(arm)
        begin = time.perf_counter()
        self._llm.llm_engine.step()
        return (time.perf_counter() - begin) * 1000

    def _record(self, arm: str) -> None:
        """Let the next step record what the arm says."""
        from hydra_kernels.ops.cpu import TableField

        recorder = self._recorder
        recorder.every = 1 if arm == "on" else 0
        address = 0 if arm == "none" else recorder.probe.control.data_ptr()
        for slots in recorder.layers:
            slots.table[:, :, TableField.PROBE] = (slots.table[:, :, TableField.RANK] > 0) * address


def tokens(seed: int) -> Iterator[int]:
    """A prompt of its own for each request."""
    return (1000 + (seed * 7919 + i * 104729) % 40000 for i in range(PROMPT_TOKENS))


if __name__ == "__main__":
    started = time.monotonic()
    status = main()
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(status)
