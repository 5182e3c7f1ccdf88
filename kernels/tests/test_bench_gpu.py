"""The GPU benchmark's own logic, on the CPU; and that vLLM's kernels are called as they are meant to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

VLLM_AGAINST_REFERENCE = """
import torch
from hydra_kernels import Layout, reference, testing
from hydra_kernels.slots import StackedSlots
from peers import VllmPair, find_vllm, load_vllm

ops, layout = load_vllm(find_vllm()), Layout(16)
for out in ((40, 24), (40,)):
    slots = StackedSlots(2, 64, out, testing.capacity_for([layout]), torch.float16, "cpu")
    held = [[testing.random_weights(64, o, layout, torch.float16, 9 * i + o) for o in out] for i in range(2)]
    for i in range(2):
        slots.load(i, held[i])
    pair, ids = VllmPair(ops, slots, 16), [0, 1, -1, 1, 0]
    pair.prepare(ids)
    x, y = torch.randn(5, 64).half(), torch.randn(5, sum(out)).half()
    expected = reference.linear(y, x, ids, held, out, torch.float64)
    pair.add_(y, x)
    assert testing.max_error(y, expected) < testing.TOLERANCE[torch.float16]
print("agrees")
"""


@pytest.fixture
def bench_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_gpu

    return bench_gpu


def test_dry_run(bench_gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All cells are measured, checked against the authors' layer and written; the table comes last."""
    out = tmp_path / "results.json"
    cells = bench_gpu.main(["--dry-run", "--rounds", "1", "--tokens", "1", "8", "2048", "--out", str(out)])
    assert {(c.tokens, c.adapters) for c in cells} == {(1, 1), (8, 1), (8, 8)}, "2048 tokens are not for a CPU"
    assert len(cells) == 3 * 2 * 2, "batches, adapters, layers"
    assert all(c.error < 1e-4 and c.peer == "one head of ours" for c in cells)
    written = json.loads(out.read_text())
    assert written["cells"] == [vars(c) for c in cells]
    assert {"gpu", "commit", "versions", "copy_gb_s"} <= set(written)
    assert "cells slower than the peer" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["ours", "peer"])
def test_a_wrong_result_is_not_measured(bench_gpu: ModuleType, wrong: str) -> None:
    """Not even a slightly wrong one, after many calls that have all added to y."""
    case = bench_gpu.LayerCase(bench_gpu.TINY["tiny"][0], bench_gpu.ADAPTERS["r8-e4"], 2, 8, "cpu", None)
    calls = case.calls(8, 2)
    case.check(8, calls)
    case.y.mul_(1e4)
    {"ours": case.ours, "peer": case.plain}[wrong].b.mul_(1.001)
    with pytest.raises(RuntimeError, match=f"{wrong}: got error"):
        case.check(8, calls)


def test_what_was_measured_before_an_interruption_is_kept(
    bench_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measure = tmp_path / "results.json", bench_gpu.measure

    def first_layer_only(*arguments: Any) -> Any:
        if arguments[2].shape.name != "qkv":
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(bench_gpu, "measure", first_layer_only)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.main(["--dry-run", "--rounds", "1", "--tokens", "1", "--out", str(out)])
    assert [cell["layer"] for cell in json.loads(out.read_text())["cells"]] == ["qkv"]


@pytest.mark.parametrize("name", ["bench_gpu", "bench_cpu"])
def test_one_command_where_nothing_is_installed(name: str, tmp_path: Path) -> None:
    """Packages are found (PYTHONPATH), an editable install of this one is not (-S: no .pth files)."""
    assert torch.__file__ is not None
    packages = str(Path(torch.__file__).parents[1])
    command = [sys.executable, "-S", str(BENCHMARKS / f"{name}.py"), "--help"]
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": packages}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_moved_bytes(bench_gpu: ModuleType) -> None:
    """Of 48 -> (32, 16, 16), float32, r=8 E=4: [A; R] 12 x 48 and B 32 x 32, 16, 16 of each adapter, x, and y twice."""
    case = bench_gpu.LayerCase(bench_gpu.TINY["tiny"][0], bench_gpu.ADAPTERS["r8-e4"], 2, 8, "cpu", None)
    assert case.moved_bytes(5, 2) == 4 * (2 * (3 * 12 * 48 + 64 * 32) + 5 * (48 + 2 * 64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the benchmark itself does not refuse")
def test_without_a_gpu_it_says_so(bench_gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_gpu.main([])
    assert "--dry-run needs none" in capsys.readouterr().err


def test_vllm_kernels_are_called_rightly(bench_gpu: ModuleType) -> None:
    """vLLM's own files, in Triton's interpreter, give the reference's plain LoRA."""
    pytest.importorskip("triton", reason="Triton, which interprets vLLM's kernels, is not installed")
    if bench_gpu.find_vllm() is None:
        pytest.skip("vLLM is not installed")
    run = subprocess.run(
        [sys.executable, "-c", VLLM_AGAINST_REFERENCE],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "agrees", run.stderr
