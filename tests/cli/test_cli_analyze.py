"""`hydraserve analyze`, as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra_kernels import Layout
from hydra_kernels.testing import random_weights

from hydraserve.adapters.checkpoint import save_adapter
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.cli.main import main


def save(folder: Path, seed: int, layout: Layout) -> str:
    modules = {
        f"model.layers.{i}.mlp.up_proj": random_weights(16, 24, layout, torch.float32, seed=seed + i) for i in range(3)
    }
    save_adapter(HydraAdapter.of(modules), folder)
    return str(folder)


def test_picture_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hydra = save(tmp_path / "hydra", 0, Layout(2, 3, has_router=True))
    lora = save(tmp_path / "lora", 10, Layout(3))
    assert main(["analyze", hydra, f"plain={lora}", "--output", str(tmp_path / "out")]) == 0
    assert "asymmetry (A less B, across adapters): " in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "asymmetry.json").read_text())
    assert result["adapters"] == ["hydra", "plain"]
    assert len(result["points"]) == 3 * (1 + 3) + 3 * 2
    assert result["asymmetry"] == pytest.approx(result["a"]["across"] - result["b"]["across"])
    assert (tmp_path / "out" / "asymmetry.png").read_bytes().startswith(b"\x89PNG")


def test_names_must_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hydra = save(tmp_path / "hydra", 0, Layout(2, 3, has_router=True))
    assert main(["analyze", hydra, hydra, "--output", str(tmp_path / "out")]) == 2
    assert "two named hydra" in capsys.readouterr().err
    assert main(["analyze", hydra, f"again={hydra}", "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--perplexity", "0"], "--perplexity: got 0.0, expected more than 0"),
        (["--perplexity", "nan"], "--perplexity: got nan"),
        (["--output", "/dev/null/out"], "--output: got /dev/null/out: Not a directory"),
    ],
)
def test_options_that_cannot_be(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hydra = save(tmp_path / "hydra", 0, Layout(2, 3, has_router=True))
    assert main(["analyze", hydra, "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
