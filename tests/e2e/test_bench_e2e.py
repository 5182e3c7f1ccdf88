"""The benchmark against a real server, and vLLM's own benchmark beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from hydraserve.bench.capacity import KV_BLOCK_TOKENS, kv_bytes_per_token
from hydraserve.bench.process import ServerProcess
from hydraserve.bench.scrape import scrape
from hydraserve.bench.usage import memory
from hydraserve.cli.main import main

REQUESTS, INPUT, OUTPUT = 4, 16, 12

# What `vllm bench serve` runs; the command itself asks for the version of a package "vllm", which CPU builds are not.
VLLM_BENCH = """\
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.fixture(scope="module")
def result(server: ServerProcess, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """One short run: the base alone, and four adapters of different kinds in a batch of four."""
    output = tmp_path_factory.mktemp("bench") / "result.json"
    arguments = ["bench", "--model", str(demo_model), "--url", server.url, "--adapters", "4", "--batch", str(REQUESTS)]
    arguments += ["--waves", "1", "--repeats", "2", "--input-len", str(INPUT), "--output-len", str(OUTPUT)]
    assert main([*arguments, "--output", str(output)]) == 0
    made: dict[str, object] = json.loads(output.read_text())
    return made


def test_bench_measures_a_real_server(result: dict[str, object]) -> None:
    assert result["complete"] is True
    cells: list[dict[str, dict[str, dict[str, float]]]] = result["cells"]  # type: ignore[assignment]
    assert [cell["adapters"] for cell in cells] == [0, 4]
    for cell in cells:
        for run in cell["runs"]:
            metrics = run["metrics"]  # type: ignore[index]
            assert metrics["failed"] == 0
            assert metrics["output_tokens"] == REQUESTS * OUTPUT
            assert metrics["prompt_tokens"] == REQUESTS * INPUT
            # A request's parts fit together, whatever the machine's speed.
            whole = metrics["ttft_ms.mean"] + (OUTPUT - 1) * metrics["tpot_ms.mean"]
            assert whole == pytest.approx(metrics["e2e_ms.mean"], rel=0.01)
            assert metrics["output_tokens_per_s"] == pytest.approx(REQUESTS * OUTPUT / metrics["duration_s"])
            # The server counted the same tokens.
            assert run["counters"]["vllm:generation_tokens"] == REQUESTS * OUTPUT  # type: ignore[index]
            assert run["counters"]["vllm:prompt_tokens"] == REQUESTS * INPUT  # type: ignore[index]


def test_vllms_own_benchmark_runs_as_it_is(server: ServerProcess, demo_model: Path, tmp_path: Path) -> None:
    adapters = ["oracle", "all-r8-e4", "attn-r4-e3", "mlp-r16-e2"]
    command = [
        *(sys.executable, "-c", VLLM_BENCH, "--backend", "openai", "--base-url", server.url),
        *("--model", str(demo_model), "--served-model-name", "demo", "--lora-modules", *adapters),
        *("--dataset-name", "random", "--random-input-len", str(INPUT), "--random-output-len", str(OUTPUT)),
        *("--ignore-eos", "--num-prompts", str(REQUESTS), "--max-concurrency", str(REQUESTS), "--disable-tqdm"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "vllm.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "vllm.json").read_text())
    assert theirs["completed"] == REQUESTS
    assert theirs["total_output_tokens"] == REQUESTS * OUTPUT
    # Whether the times agree is measured by benchmarks/agreement.py; here others take the processor meanwhile.
    assert theirs["median_tpot_ms"] > 0


def test_kv_cache_is_what_the_planner_says(server: ServerProcess, demo_model: Path) -> None:
    given = int(server.env["VLLM_CPU_KVCACHE_SPACE"]) << 30
    per_token, block = kv_bytes_per_token(AutoConfig.from_pretrained(demo_model), 4), KV_BLOCK_TOKENS["cpu"]
    assert scrape(server.url).kv_tokens == given // (per_token * block) * block


def test_memory_of_a_server_is_that_of_all_its_processes(server: ServerProcess) -> None:
    assert server.process is not None
    found = memory(server.process.pid)
    # The cache alone takes 1 GiB; weights in float32 half of one.
    assert 1.5 * 2**30 < found.pss < found.peak < 16 * 2**30
