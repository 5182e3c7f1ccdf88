"""NVIDIA's compute-sanitizer over the Triton kernels: bounds, races, barriers, and memory that nobody wrote."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from triton_cases import on_gpu

# Every kind of gate, both tile sizes, tokens without a slot, and the sum of partial sums.
STEPS = """
import torch
from hydra_kernels import testing
from triton_cases import EXPAND_CONFIGS, LAYOUTS, SHRINK_CONFIGS, make_layer, rows

layer = make_layer(LAYOUTS, torch.float16, 1100, (72, 40))
for configs in zip(SHRINK_CONFIGS, EXPAND_CONFIGS):
    ids = testing.token_slots("partial", 90, len(LAYOUTS)).tolist()
    x, y, meta = rows(90, 1100, torch.float16), rows(90, 112, torch.float16), layer.step(ids)
    expected = layer.expected(y, x, ids)
    layer.linear_(y, x, meta, configs)
    assert testing.max_error(y.cpu(), expected) < testing.TOLERANCE[torch.float16]
    layer.expand_(y, layer.shrink(x, meta, configs[0]), meta, configs[1])
torch.cuda.synchronize()
print("done")
"""


@on_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_nothing_is_found(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, part of the CUDA toolkit, is not installed")
    run = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", STEPS],
        # Without the caching allocator each tensor is an allocation of its own, whose bounds the tool knows.
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "done" in run.stdout
