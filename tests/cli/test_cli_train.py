"""`hydraserve train`, as a person runs it, and its help."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hydraserve.adapters.checkpoint import load_adapter
from hydraserve.cli.main import main
from hydraserve.training.settings import TrainSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["</s>", "a", "b", "c", "?"])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=5, num_key_value_heads=2, eos_token_id=0, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(model: Path, tmp_path: Path) -> list[str]:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": f"{x} {y}", "output": x} for x in "abc" for y in "abc"]))
    return ["train", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out"), "--max-steps", "2"]


def test_trains_an_adapter_that_the_server_reads(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--heads", "3", "--rank", "2", "--target-modules", "q_proj", "down_proj", "--log-every", "1"]
    folder = tmp_path / "out[" / "b]"  # "[/b]" would be rich's markup
    options += ["--output", str(folder)]
    assert main([*arguments, *options, "--dtype", "float32", "--eval-share", "0.2", "--rslora"]) == 0
    output = capsys.readouterr().out
    assert "out[/b]" in output.replace("\n", "")
    assert "step 2/2  loss " in output
    assert "hydralora, 3 heads" in output
    assert "7 trained, 2 for evaluation" in output
    adapter = load_adapter(folder)
    assert adapter.targets == ("down_proj", "q_proj")
    assert (adapter.rank, adapter.heads) == (2, 3)
    assert adapter.modules["model.layers.0.mlp.down_proj"].scaling == pytest.approx(16 / 2**0.5)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--heads", "0"], 2, 'heads: got 0, expected at least 1, or "auto"'),
        (["--resume"], 2, "--resume: got no checkpoint"),
        (["--data", "/no/such.json"], 1, "/no/such.json: got No such file"),
        (["--model", "/no/such"], 1, "base model: got '/no/such'"),
        (["--template", "chat"], 2, "without a chat template"),
        (["--target-modules", "nope"], 2, "--target-modules: got nope"),
        (["--output", "/dev/null/out"], 2, "--output: got /dev/null/out: Not a directory"),
    ],
)
def test_faults_are_one_line(
    arguments: list[str], options: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *options]) == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_every_setting_has_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    missing = [f.name for f in fields(TrainSettings) if f"--{f.name.replace('_', '-')}" not in text]
    assert missing == []
