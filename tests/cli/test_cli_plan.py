"""`hydraserve plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hydraserve.cli.main import main
from hydraserve.cli.plan import memory_of, parse_bytes, size
from hydraserve.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GiB", 80 << 30), ("24 GB", 24 * 10**9), ("1.5gib", 3 << 29), ("512M", 512 * 10**6), ("1073741824", 1 << 30)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text, "--memory") == count


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "5 XiB", "1..5G"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        parse_bytes(text, "--memory")


def test_sizes_are_written_for_people() -> None:
    assert [size(n) for n in (7, 2048, 9_600_000, 5 << 30)] == ["7 B", "2.0 KiB", "9.2 MiB", "5.0 GiB"]


def test_plan_prints_a_command_that_serve_takes(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tiny_llama), "--device", "cpu", "--adapters", "1000", "--memory", "4GiB"]
    assert main(["plan", *arguments, "--max-model-len", "512"]) == 0
    out = capsys.readouterr().out
    command = next(line for line in out.splitlines() if line.startswith("hydraserve "))
    assert f"--model {tiny_llama} --slots 64 --max-adapters 1000 --max-rank 8 --max-heads 4" in command
    assert "--max-model-len 512" in command
    assert "requests of 512 tokens" in out
    for word in ("base weights", "slots", "waiting adapters", "KV cache"):
        assert word in out


def test_plan_in_json_adds_up(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tiny_llama), "--device", "gpu", "--memory", "8GiB", "--host-memory", "1GiB", "--json"]
    assert main(["plan", *arguments, "--adapters", "20", "--rank", "16", "--heads", "8"]) == 0
    plan = json.loads(capsys.readouterr().out)
    used = plan["weights"] + plan["overhead"] + plan["slots"] * plan["slot"] + plan["kv_cache"]
    assert used == pytest.approx(0.9 * (8 << 30), abs=1)
    assert plan["slots"] == plan["max_adapters"] == 20
    assert plan["checked"] == []
    assert "--gpu-memory-utilization" in plan["flags"]


def test_what_does_not_fit_is_said_and_is_a_failure(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(tiny_llama), "--device", "cpu", "--memory", "1GiB"]) == 1
    assert "does NOT fit" in capsys.readouterr().out


def test_a_context_that_does_not_fit_is_said_and_is_a_failure(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model's whole context is 512 tokens; memory for one block of 128 is left."""

    def plan(memory: int) -> tuple[int, dict[str, Any]]:
        status = main([*base, "--memory", str(memory), "--json"])
        return status, json.loads(capsys.readouterr().out)

    base = ["plan", "--model", str(tiny_llama), "--device", "cpu", "--utilization", "1", "--slots", "1"]
    roomy = plan(4 << 30)[1]
    memory = (4 << 30) - roomy["kv_cache"] + 129 * roomy["kv_token"]
    status, short = plan(memory)
    assert roomy["fits"] is True
    assert (short["kv_tokens"], short["fits"], status) == (128, False, 1)
    assert main([*base, "--memory", str(memory)]) == 1
    out = capsys.readouterr().out
    assert "--max-model-len of at most 128" in out
    assert not any(line.startswith("hydraserve ") for line in out.splitlines()), "no command that would not start"


def test_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydraserve.models.memory.host_memory", lambda: 5 << 30)
    assert memory_of("cpu") == 5 << 30


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--rank", "0"], ["--utilization", "1.5"], ["--slots", "-1"], ["--memory", "x"], ["--max-model-len", "-5"]),
        *(["--max-model-len", "100000"], ["--target-modules", "qproj"], ["--tensor-parallel-size", "2"]),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "demo", "--device", "cpu", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err
