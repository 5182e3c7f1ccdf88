"""`hydraserve bench`: its arguments, and a whole run against a server that streams without a model."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from hydraserve.bench.capacity import BaseSize
from hydraserve.bench.workload import Load
from hydraserve.cli import bench
from hydraserve.cli.main import main

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from fake_server import FakeServer, serving


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args, args.passthrough = parser.parse_known_args(arguments)
    return args


def test_engine_flags_are_given_to_all_and_win_over_defaults(tiny_llama: Path) -> None:
    args = parsed("--model", str(tiny_llama), "--batch", "1,8", "--dtype", "float32", "--max-model-len=96")
    workload, loads = bench.read_workload(args)
    flags = bench.default_flags(args, workload, loads)
    assert flags[-3:] == ["--dtype", "float32", "--max-model-len=96"]
    assert flags[:3] == ["--no-enable-prefix-caching", "--max-num-seqs", "8"]
    assert "--max-model-len" not in flags, "only as it was given"


@pytest.mark.parametrize("dtype", [["--dtype=float32"], ["--dtype", "float"], ["--dtype", "float32"]])
def test_kv_cache_of_float32_is_twice_as_large(tiny_llama: Path, dtype: list[str]) -> None:
    def room(*flags: str) -> int:
        args = parsed("--model", str(tiny_llama), "--batch", "8192", *flags)
        made = bench.default_flags(args, *bench.read_workload(args))
        return int(made[made.index("--kv-cache-memory-bytes") + 1])

    assert room(*dtype) == 2 * room("--dtype", "bfloat16") == 2 * room()


def test_kv_cache_holds_the_whole_batch(tiny_llama: Path) -> None:
    args = parsed("--model", str(tiny_llama), "--batch", "4096", "--input-len", "100-200", "--output-len", "50")
    workload, loads = bench.read_workload(args)
    flags = bench.default_flags(args, workload, loads)
    room = int(flags[flags.index("--kv-cache-memory-bytes") + 1])
    assert flags[flags.index("--max-model-len") + 1] == "256"
    assert room >= 4096 * 250 * BaseSize.of(str(tiny_llama), 2).kv_token


def test_loads(tiny_llama: Path) -> None:
    closed = bench.read_workload(parsed("--model", str(tiny_llama), "--batch", "1,32"))[1]
    assert closed == [Load(concurrency=1), Load(concurrency=32)]
    open_loop = bench.read_workload(parsed("--model", str(tiny_llama), "--rate", "0.5,2", "--burstiness", "0.3"))[1]
    assert open_loop == [Load(rate=0.5, burstiness=0.3), Load(rate=2.0, burstiness=0.3)]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], "--model"),
        (["--model", "TINY", "--batch", "0"], "--batch"),
        (["--model", "TINY", "--batch", "two"], "--batch"),
        (["--model", "TINY", "--shape", "8"], "--shape"),
        (["--model", "TINY", "--arms", "off,fast"], "--arms"),
        (["--model", "TINY", "--popularity", "fame"], "--popularity"),
        (["--model", "TINY", "--repeats", "0"], "--repeats"),
        (["--model", "TINY", "--slo", "soon"], "--slo"),
        (["--model", "TINY", "--adapters", "-3"], "--adapters"),
        (["--model", "TINY", "--url", "http://127.0.0.1:9", "--enforce-eager"], "--url"),
        (["--model", "TINY", "--url", "http://127.0.0.1:9", "--arms", "off"], "--arms"),
        (["--model", "TINY", "--url", "http://127.0.0.1:9", "--reference"], "--reference"),
        (["--model", "TINY", "--url", "http://127.0.0.1:9", "--adapter", "x"], "--adapter"),
        (["--model", "TINY", "--url", "http://127.0.0.1:9", "--slots", "4"], "--slots"),
        (["--model", "TINY", "--url", "http://127.0.0.1:9", "--one-at-a-time"], "--one-at-a-time"),
        (["--model", "TINY", "--api-key", "secret"], "--api-key"),
        (["--model", "TINY", "--seed", "-5"], "--seed"),
        (["--model", "TINY", "--slots", "0"], "--slots"),
        (["--model", "TINY", "--rate", "nan"], "--rate"),
        (["--model", "TINY", "--rate", "1", "--burstiness", "nan"], "burstiness"),
        (["--model", "TINY", "--reference", "--output-len", "8-16"], "reference"),
        (["--model", "TINY", "--target-modules", "qproj"], "--target-modules"),
        (["--model", "TINY", "--adapters", "16", "--batch", "8", "--waves", "1"], "comparison"),
        (["--show", "missing.json"], "result file"),
    ],
)
def test_bad_arguments_are_refused(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], names: str
) -> None:
    assert main(["bench", *(str(tiny_llama) if a == "TINY" else a for a in arguments)]) == 2
    assert names in capsys.readouterr().err


def run(fake: FakeServer, model: Path, folder: Path, *arguments: str) -> int:
    output = ["--output", str(folder / "result.json"), "--plot", str(folder / "plot.png")]
    small = ["--input-len", "4", "--output-len", "3", "--repeats", "2"]
    return main(["bench", "--model", str(model), "--url", fake.url, *small, *output, *arguments])


def test_a_whole_run(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as fake:
        assert run(fake, tiny_llama, tmp_path, "--batch", "1,2", "--adapters", "2", "--slo", "ttft=60000") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"] is True
    assert result["stopped_by"] is None
    assert result["provenance"]["versions"]["hydraserve"]
    assert result["workload"]["output_len"] == "3"
    assert [(cell["arm"], cell["load"]["concurrency"]) for cell in result["cells"]] == [
        *(("base-only", 1), ("running-2", 1), ("base-only", 2), ("running-2", 2)),
    ]
    assert result["cells"][0]["over_repeats"]["goodput_per_s"]["min"] > 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "goodput/s" in out
    assert main(["bench", "--show", str(tmp_path / "result.json"), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| batch | arm |")


def test_the_key_of_a_running_server(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HYDRASERVE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as fake:
        fake.key = "secret"
        assert run(fake, tiny_llama, tmp_path, "--batch", "1") == 1
        assert run(fake, tiny_llama, tmp_path, "--batch", "1", "--api-key", "secret") == 0
        assert "secret" not in (tmp_path / "result.json").read_text()
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert run(fake, tiny_llama, tmp_path, "--batch", "1") == 0


def test_open_loop_run(tiny_llama: Path, tmp_path: Path) -> None:
    with serving() as fake:
        assert run(fake, tiny_llama, tmp_path, "--rate", "50", "--requests", "10", "--popularity", "zipf") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert {cell["load"]["rate"] for cell in result["cells"]} == {50.0}
    assert [run["metrics"]["requests"] for run in result["cells"][0]["runs"]] == [10, 10]


@pytest.mark.parametrize(
    ("number", "named", "status"), [(signal.SIGINT, "Ctrl-C", bench.INTERRUPTED), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_a_signal_gives_a_partial_result(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    named: str,
    status: int,
) -> None:
    from hydraserve.bench.runner import Runner

    measure_once, calls = Runner.measure_once, []

    def stop_in_the_third(self: Runner, *arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        measure_once(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "measure_once", stop_in_the_third)
    with serving() as fake:
        assert run(fake, tiny_llama, tmp_path, "--batch", "1") == status
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"] is False
    assert result["stopped_by"] == named
    assert [len(cell["runs"]) for cell in result["cells"]] == [1, 1]
    assert f"PARTIAL: stopped by {named}" in capsys.readouterr().out
