"""`hydraserve inspect`, as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra_kernels import Layout
from hydra_kernels.testing import random_weights

from hydraserve.adapters.checkpoint import save_hydralora
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.cli.main import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    layout = Layout(2, 3, has_router=True)
    modules = {f"model.layers.{i}.mlp.up_proj": random_weights(16, 24, layout, torch.float32) for i in range(3)}
    save_hydralora(HydraAdapter.of(modules, base_model="someone/base"), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "hydralora" in output
    assert "someone/base" in output
    assert "recognised by lora_nums in the config and tensors lora_route and lora_B0, lora_B1, ..." in output
    assert "module in model.layers" in output
    assert any(line.split()[:4] == ["2.mlp.up_proj", "2", "3", "224"] for line in output.splitlines())
    assert "warning" not in output


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [m["module"] for m in report["modules"]] == [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    assert (report["modules"][0]["rank"], report["modules"][0]["heads"]) == (2, 3)
    assert report["parameters"] == 3 * 224
    assert len(report["digest"]) == 64
    assert report["reason"].startswith("lora_nums in the config")
    assert report["note"] == ""


def test_a_runs_folder_says_which_one_was_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.rename(folder.parent / "checkpoint-20")
    assert main(["inspect", str(folder.parent)]) == 0
    assert "took checkpoint-20" in capsys.readouterr().out


def test_warnings_are_printed_each_on_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = random_weights(16, 24, Layout(2, 2, has_router=True), torch.float32)
    weights.b[1] = weights.b[0]
    folder = tmp_path / "a[" / "b]"  # "[/b]" would be rich's markup
    save_hydralora(HydraAdapter.of({"model.layers.0.mlp.up_proj": weights}), folder)
    assert main(["inspect", str(folder)]) == 0
    output = capsys.readouterr().out
    warning = next(line for line in output.splitlines() if line.startswith("warning: heads are copies of one another"))
    assert warning.endswith("fewer heads would do the same")
    assert output.startswith(f"{folder}: hydralora, ")


def test_missing_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
