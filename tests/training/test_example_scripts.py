"""The example scripts: the commands they give, the accuracy they count, the router usage they sum."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hydraserve.adapters.checkpoint import inspect_adapter
from hydraserve.cli import train as train_command
from hydraserve.training.settings import TrainSettings
from hydraserve.tuner import HydraLoraConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = [
    {"instruction": "Say.", "input": word, "output": word.upper(), "task": task}
    for word, task in (("a", "one"), ("b", "one"), ("c", "two"), ("d", "two"))
]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


def test_train_examples_gives_commands_that_train_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("train_examples", monkeypatch)
    given: list[TrainSettings] = []

    def record(command: list[str]) -> int:
        parser = argparse.ArgumentParser()
        train_command.add_arguments(parser)
        assert command[0] == "train"
        args = vars(parser.parse_args(command[1:]))
        assert Path(args["data"][0]).is_file()
        given.append(
            TrainSettings(**args | {"data": tuple(args["data"]), "target_modules": tuple(args["target_modules"])})
        )
        given[-1].output.mkdir()
        (given[-1].output / "adapter_config.json").write_text("{}")
        return 0

    monkeypatch.setattr(module, "hydraserve", record)
    monkeypatch.setattr(sys, "argv", ["x", "--output", str(tmp_path), "--compare", "--seeds", "0", "1"])
    module.main()
    names = ("desk", "words", "desk-lora", "words-lora")
    assert [s.output.name for s in given] == [f"compare-{name}-seed{seed}" for seed in (0, 1) for name in names]
    assert {s.alpha / s.rank for s in given} == {2.0}
    assert given[0].data[0].read_text().count("\n") == 1000
    module.main()
    assert len(given) == 8, "adapters that are there are kept"
    monkeypatch.setattr(sys, "argv", ["x", "--output", str(tmp_path), "--only", "words"])
    module.main()
    assert [s.output.name for s in given[8:]] == ["words"]
    assert given[8].data[0].read_text().count("\n") == 4000


@pytest.mark.parametrize("name", ["desk", "words"])
def test_example_adapters_load_and_are_small(name: str) -> None:
    folder = EXAMPLES / "adapters" / name
    summary = inspect_adapter(folder)
    assert (summary.format, summary.base_model) == ("hydralora-peft", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6_000_000
    assert "## How it was trained" in (folder / "README.md").read_text()


class Answers(BaseHTTPRequestHandler):
    """A server whose model `right` always answers rightly, and `half` only for the task `one`."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        word = request["prompt"].splitlines()[1]
        right = request["model"] == "right" or word in "ab"
        text = f" {word.upper()}\n" if right else word
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        body = {"id": "1", "object": "text_completion", "created": 0, "model": request["model"], "choices": [choice]}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_evaluate_counts_exact_answers(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, result = tmp_path / "held_out.jsonl", tmp_path / "result.json"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    module = script("evaluate", monkeypatch)
    arguments = ["x", "--url", url, "--data", str(data), "--models", "right", "half", "--json", str(result)]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    record = json.loads(result.read_text())
    assert record["accuracy"] == {"right": {"one": 1.0, "two": 1.0}, "half": {"one": 1.0, "two": 0.0}}
    assert record["questions"] == {"one": 2, "two": 2}
    assert {"machine", "versions", "commit"} <= record.keys()
    assert "| half | 100% | 0% | 50% |" in capsys.readouterr().out


def test_compare_takes_seeds_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    accuracy = {"base": {"x": 0.0, "y": 0.5}, "a-seed0": {"x": 0.8, "y": 1.0}, "a-seed1": {"x": 0.6, "y": 1.0}}
    result.write_text(json.dumps({"accuracy": accuracy}))
    module = script("compare", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["x", str(result)])
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| base | 1 | 0.0% | 50.0% | 25.0% |" in lines
    assert "| a | 2 | 70.0% (60.0-80.0) | 100.0% (100.0-100.0) | 85.0% (80.0-90.0) |" in lines


def test_router_usage_is_the_mean_over_the_answers(
    tiny_model: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("router_usage", monkeypatch)
    config = HydraLoraConfig(r=2, num_heads=3, target_modules=["up_proj"], init_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model), config).eval()
    usage = module.usage_by_task(model, tokenizer, ROWS)
    assert set(usage) == {"one", "two"}
    path = "model.layers.0.mlp.up_proj"
    layer = model.base_model.model.get_submodule(path)
    expected = []
    for row in ROWS[:2]:
        text = f"Say.\n{row['input']}\n{row['output']}"
        inputs: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0]))
        with torch.no_grad():
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
        handle.remove()
        weights = torch.softmax(layer.parts("default").router(inputs[0][0, -2:]), -1)  # line break, answer
        expected.append(weights.mean(0))
    torch.testing.assert_close(usage["one"][path], torch.stack(expected).mean(0))
    assert module.distance(usage["one"], usage["one"], "up_proj") == 0
    assert 0 < module.distance(usage["one"], usage["two"], "up_proj") < 1
    module.report(usage)
    record = module.record(usage, ROWS)
    assert record["questions"] == {"one": 2, "two": 2}
    assert record["usage"]["one"][path] == pytest.approx(usage["one"][path].tolist(), abs=1e-4)
