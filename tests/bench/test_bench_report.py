"""The result file, the table and the picture."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from hydraserve.bench.arms import Arm
from hydraserve.bench.machine import commit, machine, provenance, versions
from hydraserve.bench.plot import against_adapters, against_load, plot
from hydraserve.bench.result import CellRuns, Result, load, save
from hydraserve.bench.table import markdown, show
from hydraserve.bench.workload import Load
from hydraserve.errors import ConfigError

OFF = Arm("off", "LoRA off", "off", "off", ("base",), 0)
ONE = Arm("hydra-1", "HydraLoRA r8 E4, 1 adapter", "hydra", "hydra", ("a",), 1, "r8 E4")
EIGHT = Arm("hydra-8", "HydraLoRA r8 E4, 8 adapters", "hydra", "hydra", ("a",) * 8, 8, "r8 E4")


def metrics(tokens_per_s: float, share: float = 0.0, failed: float = 0.0) -> dict[str, float | None]:
    return {
        "output_tokens_per_s": tokens_per_s,
        "tpot_ms.p50": 1000 / tokens_per_s,
        "ttft_ms.p50": 100.0,
        "itl_ms.p99": 9.0,
        "memory_pss_bytes": 2.5 * 2**30,
        "other_processes_cpu_share": share,
        "failed": failed,
    }


def result(**changes: Any) -> dict[str, Any]:
    about = {
        "provenance": {"machine": {"gpus": [], "cpu": "Some CPU", "cores": 2, "cpu_flags": ["avx2", "avx512f"]}},
        "model": "demo",
        "engine_flags": ["--enforce-eager"],
        "workload": {"input_len": "32", "output_len": "64", "popularity": "distinct"},
    }
    cells = []
    for batch, speeds in ((1, (10.0, 8.0)), (8, (100.0, 80.0, 50.0))):
        for arm, speed in zip((OFF, ONE, EIGHT), speeds, strict=False):
            cell = CellRuns(arm, Load(concurrency=batch))
            for factor in (0.9, 1.0, 1.1):
                cell.add(metrics(speed * factor), {}, [])
            cells.append(cell)
    made = Result(about, "off", cells, {}, complete=True).to_json()
    return made | changes


def test_markdown_has_medians_ranges_and_ratios() -> None:
    lines = markdown(result()).splitlines()
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert head == [
        *("batch", "arm", "tok/s", "/ off", "TPOT ms", "/ off", "TTFT ms", "/ off", "ITL p99 ms", "memory"),
    ]
    row = [cell.strip() for cell in lines[6].strip("|").split("|")]
    # 50 +- 10 % tokens; the ratio of each pair is exactly 0.5; 1000/45 .. 1000/55 ms
    assert row[:6] == ["8", "HydraLoRA r8 E4, 8 adapters", "50.0 ±10%", "0.50", "20.0 ±10%", "2.00"]
    assert row[-1] == "2.50 GiB"
    assert lines[2].startswith("| 1 | LoRA off | 10.0 ±10% | - |")
    assert "--enforce-eager" in lines[-1]
    assert "Medians of 3 repeats" in lines[-1]


def test_terminal_table_has_the_same_cells() -> None:
    out = StringIO()
    show(result(), out)
    text = out.getvalue()
    assert "demo on Some CPU, 2 cores with AVX-512" in text
    line = next(line for line in text.splitlines() if "8 adapters" in line)
    assert line.split() == [
        *("8", "HydraLoRA", "r8", "E4,", "8", "adapters", "50.0", "±10%", "0.50", "20.0", "±10%", "2.00"),
        *("100", "1.00", "9.0", "2.50", "GiB"),
    ]


def test_what_must_be_known_is_said() -> None:
    bad = result(complete=False, stopped_by="Ctrl-C")
    bad["cells"][0]["runs"][0]["metrics"] |= {"failed": 2.0, "other_processes_cpu_share": 0.31}
    text = markdown(bad)
    assert "PARTIAL: stopped by Ctrl-C" in text
    assert "FAILED REQUESTS: 2" in text
    assert "up to 31% of the processor" in text
    good = markdown(result())
    assert not any(word in good for word in ("PARTIAL", "FAILED", "NOISY"))


def test_what_was_left_out_is_said() -> None:
    why = "8 requests a run cannot ask for 16 adapters in turn"
    load = {"concurrency": 8, "rate": None, "burstiness": 1.0}
    items = [{"arm": "x", "label": f"HydraLoRA r{rank}, 16 adapters", "load": load, "why": why} for rank in (8, 16)]
    text = markdown(result(left_out=items))
    line = f"NOT MEASURED, as {why}: HydraLoRA r8, 16 adapters (batch 8); HydraLoRA r16, 16 adapters (batch 8)."
    assert line in text.splitlines()
    assert "NOT MEASURED" not in markdown(result())


def test_servers_one_after_the_other_and_late_requests_are_said() -> None:
    apart = result(interleaved=False)
    apart["cells"][1]["runs"][2]["metrics"]["send_lag_ms.max"] = 480.0
    text = markdown(apart)
    assert "far apart in time" in text
    assert "repeat by repeat" not in text
    assert "LATE: the client sent requests up to 480 ms" in text
    assert "LATE" not in markdown(result(interleaved=True))


def test_loads_peak_and_gpu_memory_are_shown_where_there_are_any() -> None:
    cell = CellRuns(ONE, Load(concurrency=1))
    for loads in (2.0, 4.0):
        cell.add(
            metrics(10.0) | {"adapter_loads": loads, "run_peak_bytes": 2.0**30, "gpu_memory_bytes": 2.0**31}, {}, []
        )
    made = result(cells=Result({}, "off", [cell]).to_json()["cells"])
    head, _, row = (line.strip("|").split("|") for line in markdown(made).splitlines()[:3])
    shown = {name.strip(): value.strip() for name, value in zip(head, row, strict=True)}
    assert shown["loads"] == "3 ±33%"
    assert (shown["memory"], shown["peak"], shown["GPU memory"]) == ("2.50 GiB", "1.00 GiB", "2.00 GiB")
    for run in cell.metrics:
        run["adapter_loads"] = 0.0
    assert "loads" not in markdown(result(cells=Result({}, "off", [cell]).to_json()["cells"]))


def test_open_loop_and_goodput_columns() -> None:
    cell = CellRuns(OFF, Load(rate=2.5))
    cell.add(metrics(10.0) | {"goodput_per_s": 1.25}, {}, [])
    made = result(
        cells=Result({}, "off", [cell]).to_json()["cells"], workload={"conversations": 7, "popularity": "zipf"}
    )
    lines = markdown(made).splitlines()
    assert lines[0].startswith("| requests/s | arm |")
    assert "goodput/s" in lines[0]
    assert lines[2].startswith("| 2.5 | LoRA off |")
    assert " 1.25 |" in lines[2]
    assert "7 conversations from a file, adapters zipf." in lines[-1]


def test_lines_of_the_picture() -> None:
    speed = "output_tokens_per_s"
    loads = against_load(result(), speed)
    assert {label: [(x, y["median"]) for x, y in points] for label, points in loads.items()} == {
        "LoRA off": [(1, 10), (8, 100)],
        "HydraLoRA r8 E4, 1 adapter": [(1, 8), (8, 80)],
        "HydraLoRA r8 E4, 8 adapters": [(8, 50)],
    }
    adapters = against_adapters(result(), speed)
    assert [(x, y["median"]) for x, y in adapters["HydraLoRA r8 E4, batch 8"]] == [(1, 80), (8, 50)]
    assert [(x, y["median"]) for x, y in adapters["LoRA off, batch 1"]] == [(0, 10)]


def test_picture_is_a_png(tmp_path: Path) -> None:
    plot(result(), tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_result_file_comes_back(tmp_path: Path) -> None:
    made = result()
    save(made, tmp_path / "folder" / "result.json")
    assert load(tmp_path / "folder" / "result.json") == json.loads(json.dumps(made))
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["result.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "hydraserve bench", "schema": 0}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ConfigError, match="result file"):
        load(tmp_path / "file.json")


def test_provenance_says_where_but_not_who() -> None:
    found = provenance()
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory_bytes"] > 2**28
    assert {"python", "torch", "hydraserve"} <= set(versions())
    assert "hostname" not in json.dumps(found).lower()
    assert machine() == found["machine"]
    known = commit()
    assert known is None or len(known["id"]) == 40
