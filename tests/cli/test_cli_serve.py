"""`hydraserve serve` up to the start of the engine: arguments, checks, messages, exit statuses."""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path

import pytest
from hydra_kernels import SlotCapacity

from hydraserve.adapters.checkpoint import inspect_adapter
from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.sizing import plan_slots
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.cli import serve
from hydraserve.cli.main import COMMANDS, FAILURE, USAGE_ERROR, main
from hydraserve.config import AdapterSource, ServeConfig
from hydraserve.errors import ConfigError

SHAPES = {
    f"model.layers.{i}.{name}": shape
    for i in range(2)
    for name, shape in {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (32, 16),
        "mlp.gate_proj": (32, 64),
        "mlp.down_proj": (64, 32),
    }.items()
}


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--debug", action="store_true")
    serve.add_arguments(parser)
    args, args.passthrough = parser.parse_known_args(arguments)
    return args


@pytest.mark.parametrize(
    ("text", "name"), [("./runs/sql", "sql"), ("chat=./runs/sql/", "chat"), ("/data/a=b/sql", "sql")]
)
def test_adapter_names(text: str, name: str) -> None:
    assert serve.adapter_source(text).name == name


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "m", "--adapter", "a/x", "--adapter", "b/x"],
        ["--model", "m", "--adapter", "m=./x"],
        ["--model", "m", "--slots", "0"],
        ["--model", "m", "--max-heads", "-1"],
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == USAGE_ERROR
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "To fix" in err
    assert err.count("\n") == 1


def test_fully_sharded_and_dual_stream_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="fully-sharded"):
        serve.refuse_unsupported(["--fully-sharded-loras"])
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")
    with pytest.raises(ConfigError, match="DUAL_STREAM"):
        serve.refuse_unsupported([])


def test_several_api_server_processes_find_one_another_in_a_folder_of_their_own() -> None:
    with serve.sockets_folder(0) as folder:
        assert folder is None
    with serve.sockets_folder(2) as folder:
        assert folder is not None
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_port_in_use_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", "demo", "--host", "127.0.0.1", "--port", port]) == FAILURE
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


def test_a_missing_adapter_folder_is_said_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", "demo", "--port", "0", "--adapter", str(tmp_path / "nope")]) == FAILURE
    assert "nope" in capsys.readouterr().err


def test_unknown_command_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frobnicate"]) == USAGE_ERROR
    assert "models" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_plan_follows_the_adapters(tmp_path: Path) -> None:
    save_adapter(make_adapter(SHAPES, ("q_proj",), 4, 3), tmp_path / "a")
    save_adapter(make_adapter(SHAPES, ("gate_proj", "down_proj"), 6, 2), tmp_path / "b")
    summaries = [inspect_adapter(tmp_path / name) for name in "ab"]
    sources = tuple(AdapterSource(name, tmp_path / name) for name in "ab")
    plan = plan_slots(ServeConfig("m", sources), summaries, SHAPES, 2)
    assert plan.slots == plan.max_adapters == 2
    assert plan.targets == ("down_proj", "gate_proj", "q_proj")
    assert plan.capacity == SlotCapacity(rows=9, k=18, heads=3)  # room for rank 6 with 3 heads
    wrapped = 2 * ((9 * 32 + 18 * 32) + (9 * 32 + 18 * 64) + (9 * 64 + 18 * 32))
    assert plan.slot_bytes == 2 * wrapped


def test_plan_refuses_flags_smaller_than_the_adapters(tmp_path: Path) -> None:
    save_adapter(make_adapter(SHAPES, ("q_proj",), 8, 4), tmp_path / "a")
    summary = inspect_adapter(tmp_path / "a")
    source = AdapterSource("a", tmp_path / "a")
    with pytest.raises(ConfigError, match="--max-rank"):
        plan_slots(ServeConfig("m", (source,), max_rank=4), [summary], SHAPES, 2)
    with pytest.raises(ConfigError, match="--max-heads"):
        plan_slots(ServeConfig("m", (source,), max_heads=2), [summary], SHAPES, 2)
    with pytest.raises(ConfigError, match="up_proj"):
        plan_slots(ServeConfig("m", target_modules=("up_proj",)), [], SHAPES, 2)


def test_what_the_user_passes_to_vllm_wins() -> None:
    args = parse("--model", "m", "--max-lora-rank", "64", "--served-model-name", "other", "--dtype", "float16")
    config = serve.serve_config(args)
    plan = plan_slots(config, [], SHAPES, 2)
    arguments = serve.engine_arguments(config, "/models/m", plan, args.passthrough)
    assert arguments.count("--max-lora-rank") == arguments.count("--served-model-name") == 1
    assert arguments[arguments.index("--max-lora-rank") + 1] == "64"
    capacity = json.loads(arguments[arguments.index("--additional-config") + 1])["hydraserve"]["capacity"]
    assert SlotCapacity(**capacity) == plan.capacity
