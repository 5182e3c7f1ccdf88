"""`hydraserve serve` up to the start of the engine: arguments, checks, messages, exit statuses."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra_kernels import HydraWeights, Layout, SlotCapacity

from hydraserve.adapters.checkpoint import inspect_adapter
from hydraserve.adapters.requirements import check_capacity
from hydraserve.adapters.save import save_adapter, save_loramoe
from hydraserve.adapters.sizing import plan_slots, readable_adapters
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.cli import serve
from hydraserve.cli.main import COMMANDS, FAILURE, USAGE_ERROR, main
from hydraserve.config import DEFAULT_SLOTS, AdapterSource, ServeConfig
from hydraserve.errors import ConfigError, LimitError

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


def one_module(layout: Layout) -> HydraAdapter:
    weights = HydraWeights(
        a=torch.ones(layout.a_rows, 32),
        b=torch.ones(layout.heads, 32, layout.rank),
        layout=layout,
        router=torch.ones(layout.heads, 32),
    )
    return HydraAdapter.of({"model.layers.0.self_attn.q_proj": weights})


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("./runs/sql", "sql"),
        ("chat=./runs/sql/", "chat"),
        ("team/sql=./x", "team/sql"),
        ("/data/a=b/sql", "sql"),
        ("./a=b/sql", "sql"),
        ("a=b/there", "there"),
        ("a=b/elsewhere", "a"),
    ],
)
def test_adapter_names(text: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a=b" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert serve.adapter_source(text).name == name


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "m", "--adapter", "a/x", "--adapter", "b/x"],
        ["--model", "m", "--adapter", "m=./x"],
        ["--model", "m", "--adapter", "./my adapter"],
        ["--model", "m", "--adapter", "x@head=2=./x"],
        ["--model", "m", "--adapter", "my sql!=./x"],
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
    save_adapter(make_adapter(SHAPES, ("gate_proj", "down_proj"), 6, 1), tmp_path / "b")
    summaries = [inspect_adapter(tmp_path / name) for name in "ab"]
    sources = tuple(AdapterSource(name, tmp_path / name) for name in "ab")
    plan = plan_slots(ServeConfig("m", sources), summaries, SHAPES, 2)
    assert plan.slots == plan.max_adapters == 2
    assert plan.targets == ("down_proj", "gate_proj", "q_proj")
    assert plan.capacity == SlotCapacity(rows=7, k=12, heads=3)  # no room for rank 6 with 3 heads, which none has
    assert plan.max_rank == 6
    wrapped = 2 * ((7 * 32 + 12 * 32) + (7 * 32 + 12 * 64) + (7 * 64 + 12 * 32))
    assert plan.slot_bytes == 2 * wrapped


def test_plan_leaves_the_room_that_flags_ask_for(tmp_path: Path) -> None:
    save_adapter(make_adapter(SHAPES, ("q_proj",), 8, 2), tmp_path / "a")
    summary = inspect_adapter(tmp_path / "a")

    def capacity(**flags: Any) -> SlotCapacity:
        return plan_slots(ServeConfig("m", **flags), [summary], SHAPES, 2).capacity

    assert capacity(max_rank=16) == SlotCapacity(rows=18, k=32, heads=2)
    assert capacity(max_heads=4) == SlotCapacity(rows=12, k=32, heads=4)
    assert capacity(max_heads=4, per_head_a=True) == SlotCapacity(rows=36, k=32, heads=4)


def test_plan_takes_what_lies_in_the_adapter_folder(tmp_path: Path) -> None:
    """One A for each head needs more rows than the default room has; what cannot be served here is passed over."""
    per_head = one_module(Layout(8, 4, shared_a=False, has_router=True))
    save_loramoe(per_head, tmp_path / "moe")
    save_adapter(make_adapter({"transformer.h.0.c_attn": (8, 8)}, ("c_attn",), 4, 2), tmp_path / "other-base")
    (tmp_path / "no-adapter").mkdir()
    later = readable_adapters(tmp_path)
    assert len(later) == 2
    plan = plan_slots(ServeConfig("m", adapter_dir=tmp_path), [], SHAPES, 2, later)
    assert plan.slots == DEFAULT_SLOTS
    assert plan.capacity == SlotCapacity(rows=36, k=64, heads=4)
    assert plan.targets == ("q_proj",)
    check_capacity(per_head, plan.capacity)
    with pytest.raises(ConfigError, match="--adapter-dir"):
        readable_adapters(tmp_path / "nowhere")


@pytest.mark.parametrize("shared_a", [True, False])
def test_an_adapter_that_does_not_fit_names_flags_that_suffice(shared_a: bool) -> None:
    adapter = one_module(Layout(8, 4, shared_a=shared_a, has_router=True))
    small = plan_slots(ServeConfig("m", max_rank=4, max_heads=4), [], SHAPES, 2).capacity
    with pytest.raises(LimitError) as caught:
        check_capacity(adapter, small)
    words = str(caught.value.fix).split()
    flags = parse("--model", "m", *(w for w in words if w.startswith("--") or w.isdigit()))
    check_capacity(adapter, plan_slots(serve.serve_config(flags), [], SHAPES, 2).capacity)


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
