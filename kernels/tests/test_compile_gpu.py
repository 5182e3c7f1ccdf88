"""The machine code for GPUs that are not there: no spills, wide loads, the matrix instruction that is meant."""

from __future__ import annotations

import os
import re

import pytest
import torch
from hydra_kernels.tuning.config import ExpandConfig
from hydra_kernels.tuning.shapes import ADAPTERS, MODELS, capacity

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
