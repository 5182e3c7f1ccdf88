"""The machine code for GPUs that are not there: no spills, wide loads, the matrix instruction that is meant."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from hydra_kernels.tuning.config import ExpandConfig
from hydra_kernels.tuning.shapes import ADAPTERS, MODELS, capacity
from hydra_kernels.weights import Layout

triton = pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")
from hydra_kernels.tuning.machine_code import MachineCode, compile_launch, linear_launches  # noqa: E402  needs triton

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="in the interpreter's process nothing can be compiled"
    ),
    pytest.mark.skipif(
        not os.access(triton.knobs.nvidia.ptxas.path, os.X_OK), reason="Triton was installed without ptxas"
    ),
]

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
QKV = MODELS["llama-3-8b"][0]
SLOTS = capacity(ADAPTERS["r8-e4"])


def check(code: MachineCode, matrix: str) -> None:
    assert (code.spills, code.stack_bytes) == (0, 0)
    assert code.shared_bytes <= 96 * 1024, "two programs have to fit a multiprocessor"
    assert code.loads[128] >= 8, "x, A, B and y are loaded 16 bytes at once"
    assert {name.split(".")[0] for name in code.matrix} == {matrix}


@pytest.mark.parametrize("tokens", [8, 2048])
def test_hopper(tokens: int) -> None:
    """In decode and in prefill alike, shrink multiplies by warps and expand by warp groups, 16 columns of K at once:
    so a row's sums are taken in one order, whatever the batch."""
    shrink, expand = (compile_launch(x, 90) for x in linear_launches(QKV, SLOTS, tokens, torch.bfloat16)[:2])
    check(shrink, "HMMA")
    check(expand, "HGMMA")
    assert shrink.matrix == ("HMMA.16816.F32.BF16",)
    assert all(re.fullmatch(r"HGMMA\.64x\d+x16\.F32\.BF16", name) for name in expand.matrix)


def test_ampere() -> None:
    for launch in linear_launches(QKV, SLOTS, 8, torch.float16)[:2]:
        code = compile_launch(launch, 80)
        check(code, "HMMA")
        assert code.matrix == ("HMMA.16816.F32",)


@pytest.mark.parametrize(
    ("model", "layer", "rank", "heads", "tokens", "capability"),
    [
        ("llama-3-8b", "gate_up", 16, 8, 128, 90),
        ("llama-2-7b", "down", 16, 8, 128, 80),
        ("llama-3-8b", "down", 16, 8, 256, 80),
        ("llama-3-8b", "down", 16, 4, 128, 80),
        ("llama-3-8b", "qkv", 64, 8, 2048, 80),
    ],
)
def test_what_needs_most_registers(model: str, layer: str, rank: int, heads: int, tokens: int, capability: int) -> None:
    """32 tokens that meet many partial sums, and a loop over K: with 4 warps and no limit these spilled."""
    shape = next(shape for shape in MODELS[model] if shape.name == layer)
    size = capacity(Layout(rank, heads, has_router=True))
    code = compile_launch(linear_launches(shape, size, tokens, torch.bfloat16)[1], capability)
    check(code, "HGMMA" if capability == 90 else "HMMA")


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_results_are_of_these_kernels(version: str) -> None:
    """What is written down about the machine code is about kernels of the present names and parameters."""
    entries = json.loads((RESULTS / f"compile_triton_{version}.json").read_text())["entries"]
    present = {}
    for launch in linear_launches(QKV, SLOTS, 8, torch.bfloat16):
        constants = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
        present[launch.kernel.__name__.strip("_")] = constants
    assert {entry["kernel"] for entry in entries} == set(present)
    for entry in entries:
        assert present[entry["kernel"]] <= set(entry["constants"]), "measure again: bench_compile.py"
        assert (entry["spills"], entry["stack_bytes"]) == (0, 0)


def test_sum_of_partial_sums() -> None:
    """Loads, additions, stores: nothing else, and the benchmark can tell how many programs run at once."""
    launch = linear_launches(QKV, SLOTS, 8, torch.bfloat16)[2]
    code = compile_launch(launch, 90)
    assert (code.spills, code.stack_bytes, code.matrix) == (0, 0, ())
    assert launch.options["num_warps"] == 4


def test_programmatic_dependent_launch() -> None:
    config = ExpandConfig(16, 16, 64, 1, 32, pdl=True)
    shrink, expand, _ = linear_launches(QKV, SLOTS, 8, torch.bfloat16, expand_config=config)
    assert expand.options["launch_pdl"]
    assert "launch_pdl" not in shrink.options, "shrink itself has to wait for what writes x"
    assert compile_launch(shrink, 90).pdl == ("PREEXIT",)
    assert compile_launch(expand, 90).pdl == ("ACQBULK",)
