"""`hydraserve convert`, as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra_kernels import Layout
from hydra_kernels.testing import random_weights

from hydraserve.adapters.checkpoint import load_adapter, save_hydralora, save_lora
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.cli.main import main


def adapter(layout: Layout) -> HydraAdapter:
    modules = {
        f"model.layers.{i}.mlp.up_proj": random_weights(16, 24, layout, torch.bfloat16, seed=i) for i in range(2)
    }
    return HydraAdapter.of(modules, base_model="someone/base")


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authors, peft, back = (tmp_path / name for name in ("authors", "peft", "back"))
    save_hydralora(adapter(Layout(2, 3, has_router=True)), authors, lora_dropout=0.05)
    assert main(["convert", str(authors), str(peft), "--to", "peft"]) == 0
    assert main(["convert", str(peft), str(back), "--to", "hydralora"]) == 0
    assert [load_adapter(path).format for path in (authors, peft, back)] == ["hydralora", "hydralora-peft", "hydralora"]
    assert load_adapter(authors).digest == load_adapter(peft).digest == load_adapter(back).digest
    assert load_adapter(back).base_model == "someone/base"
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (authors, peft, back)]
    assert [config["lora_dropout"] for config in configs] == [0.05, 0.05, 0.05]
    assert "equal" in capsys.readouterr().out


def test_plain_lora_goes_to_peft_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = adapter(Layout(4))
    save_lora(lora, tmp_path / "lora")
    assert main(["convert", str(tmp_path / "lora"), str(tmp_path / "copy"), "--to", "peft"]) == 0
    assert load_adapter(tmp_path / "copy").digest == lora.digest
    assert main(["convert", str(tmp_path / "lora"), str(tmp_path / "never"), "--to", "hydralora"]) == 1
    assert "no router" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_an_adapter_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    save_hydralora(adapter(Layout(2, 3, has_router=True)), source)
    save_lora(adapter(Layout(4)), target)
    arguments = ["convert", str(source), str(target), "--to", "peft"]
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert load_adapter(target).format == "lora"
    assert main([*arguments, "--overwrite"]) == 0
    assert load_adapter(target).digest == load_adapter(source).digest


def test_missing_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "new"), "--to", "peft"]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.parametrize("to", ["lora", "peft", "molora"])
def test_scalings_of_rslora_that_no_number_divided_by_r_gives(to: str, tmp_path: Path) -> None:
    for rank in (20, 80):
        source, target = tmp_path / f"{rank}", tmp_path / f"{rank}-{to}"
        save_lora(adapter(Layout(rank)), source)
        config = json.loads((source / "adapter_config.json").read_text())
        (source / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16, "use_rslora": True}))
        assert main(["convert", str(source), str(target), "--to", to]) == 0
        assert load_adapter(target).digest == load_adapter(source).digest


def test_a_copy_that_differs_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The authors' code knows no rsLoRA, so their layout has no place for this scaling."""
    source, target = tmp_path / "source", tmp_path / "target"
    save_hydralora(adapter(Layout(20, 3, has_router=True)), source)
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16, "use_rslora": True}))
    assert main(["convert", str(source), str(target), "--to", "hydralora"]) == 1
    assert "--to molora" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]
    assert main(["convert", str(source), str(target), "--to", "molora"]) == 0
