"""`hydraserve plan --check`: the plan against a server that was started by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hydraserve.cli.main import main


@pytest.mark.long
def test_a_plan_is_checked_against_a_server(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a model that starts quickly."""
    arguments = ["plan", "--model", str(tiny_llama), "--adapters", "2", "--memory", "3500MiB", "--device", "cpu"]
    status = main([*arguments, "--max-model-len", "256", "--check", "--json"])
    plan = json.loads(capsys.readouterr().out)
    tokens, taken = plan["checked"]
    assert (tokens["name"], tokens["planned"]) == ("KV tokens", plan["kv_tokens"])
    assert tokens["found"] == tokens["planned"]
    assert taken["name"] == "memory in bytes"
    # What the processes take is estimated for models of some size (docs/benchmarks.md); the KV cache is in it anyway.
    assert plan["kv_cache"] < taken["found"] < 1.25 * taken["planned"]
    assert status == (0 if abs(taken["difference"]) <= 0.05 else 1)
