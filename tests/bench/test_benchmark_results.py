"""The committed results: docs/benchmarks.md says what the files say, and targets are judged as they should be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hydraserve.bench.arms import Arm
from hydraserve.bench.check import Checked
from hydraserve.bench.result import CellRuns, Result, save
from hydraserve.bench.workload import Load

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import agreement  # noqa: E402
import run as benchmarks  # noqa: E402
import targets  # noqa: E402


def test_the_document_is_made_from_the_result_files() -> None:
    text = benchmarks.DOCUMENT.read_text()
    assert text.count("<!-- table ") == text.count("<!-- end -->") >= 8
    assert benchmarks.with_tables(text) == text, "python benchmarks/run.py --docs"


def test_every_result_file_is_in_a_document() -> None:
    """As a table made from it, or by its name."""
    text = "".join(document.read_text() for document in benchmarks.DOCUMENT.parent.glob("*.md"))
    missing = [
        file.name
        for file in benchmarks.RESULTS.glob("*.json")
        if f"<!-- table {file.stem} -->" not in text and file.name not in text
    ]
    assert missing == []


def test_result_files_say_where_they_come_from() -> None:
    for file in benchmarks.RESULTS.glob("*.json"):
        result = json.loads(file.read_text())
        assert result["provenance"]["machine"]["cpu"], file
        assert result["provenance"]["versions"]["torch"], file
        assert result["provenance"]["commit"]["changed_files"] is False, f"{file} was not measured at a commit"
        assert result.get("complete", True) is True, file
        assert not any(path in file.read_text() for path in ("/home", "/root", "/tmp")), file


def test_what_is_promised_of_adapters_that_come_and_go_was_measured() -> None:
    results = {
        file.stem: json.loads(file.read_text())["result"] for file in benchmarks.RESULTS.glob("lifecycle_*.json")
    }
    assert len(results) >= 5
    assert [name for name, result in results.items() if result["met"] is not True] == []
    ratio = results["lifecycle_stall"]["loading_over_quiet"]["p99"]
    assert ratio <= results["lifecycle_stall"]["target"] == 1.5


def test_every_target_has_its_measurement() -> None:
    for target in targets.TARGETS:
        arguments = benchmarks.BENCH[target.file][1].split()
        batches = arguments[arguments.index("--batch") + 1].split(",")
        assert str(target.batch) in batches, target
        counts = arguments[arguments.index("--adapters") + 1].split(",")
        for arm in (target.arm, target.base):
            if arm not in ("off", "base-only"):
                assert arm.rpartition("-")[2] in counts, target


def result_file(folder: Path, **speeds: list[float]) -> Path:
    """tok/s of each repeat by arm, at batch 8."""
    cells = []
    for name, values in speeds.items():
        cell = CellRuns(Arm(name, name, "hydra", "s", ("m",), 1), Load(concurrency=8))
        for value in values:
            cell.add({targets.TOKENS: value}, {}, [])
        cells.append(cell)
    save(Result({}, None, cells, complete=True).to_json(), folder / "f.json")
    return folder


def judged(folder: Path, **changes: Any) -> list[str]:
    target = targets.Target("t", "f", "arm", "base", 8, targets.TOKENS, 2.0, **changes)
    return [cell.strip() for cell in targets.table(folder, targets=[target]).splitlines()[2].strip("|").split("|")]


def test_a_target_is_judged_by_the_median_of_paired_ratios(tmp_path: Path) -> None:
    folder = result_file(tmp_path, arm=[10.0, 30.0, 21.0], base=[10.0, 10.0, 10.0])
    crosses = "range crosses the limit"
    assert judged(folder) == ["t", "8", "at most 2.00", "2.10 [1.00..3.00]", f"**missed**, {crosses}"]
    assert judged(folder, at_least=True)[2:] == ["at least 2.00", "2.10 [1.00..3.00]", f"met, {crosses}"]
    folder = result_file(tmp_path, arm=[21.0, 22.0], base=[10.0, 10.0])
    assert judged(folder)[4] == "**missed**"
    assert judged(folder, at_least=True)[4] == "met"


def test_clients_agree_when_their_ranges_overlap() -> None:
    """Not when they lie apart by less than they are wide."""
    a, b, c = ({"median": m, "min": m - 1, "max": m + 1} for m in (10.0, 11.5, 12.5))
    assert agreement.overlap(a, a)
    assert agreement.overlap(a, b)
    assert not agreement.overlap(a, c)


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    assert judged(tmp_path)[3:] == ["-", "not measured"]
    assert judged(result_file(tmp_path, arm=[1.0]))[3:] == ["-", "not measured"]
    assert "Not measured yet" in benchmarks.table("no-such-measurement")


def test_a_checked_plan_agrees_within_five_percent() -> None:
    assert Checked("x", 1000, 1050).agrees
    assert Checked("x", 1000, 950).agrees
    assert not Checked("x", 1000, 1051).agrees
    assert Checked("x", 1000, 900).difference == pytest.approx(-0.1)
