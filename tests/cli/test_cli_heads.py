"""`hydraserve heads`, as a person runs it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from hydraserve.cli.main import main


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rng = random.Random(0)
    rows = [
        {"instruction": " ".join(rng.sample([f"w{topic}x{i}" for i in range(10)], 8)), "output": f"o{topic}"}
        for topic in range(4)
        for _ in range(20)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_table_and_plot(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["heads", "--data", str(data), "--max-heads", "6", "--plot", str(tmp_path / "curve.png")]) == 0
    output = capsys.readouterr().out
    assert "suggested: --heads 4 (80 examples)" in output
    marked = next(line for line in output.splitlines() if "elbow" in line)
    assert marked.split()[0] == "4"
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_being_told_where(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["heads", "--data", str(data), "--max-heads", "3"]) == 0
    assert "curve: heads.png" in capsys.readouterr().out
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_dbscan(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["heads", "--data", str(data), "--method", "dbscan"]) == 0
    assert "suggested: --heads 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-heads", "2"], "--max-heads: got 2, expected at least 3"),
        (["--method", "dbscan", "--plot", "x.png"], "--plot: got --method dbscan"),
        (["--plot", "/dev/null/x.png"], "--plot: got /dev/null: "),
    ],
)
def test_wrong_options(data: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["heads", "--data", str(data), *options]) == 2
    assert message in capsys.readouterr().err


def test_bad_data_names_the_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data.write_text(data.read_text() + "\n{broken")
    assert main(["heads", "--data", str(data)]) == 1
    assert f"{data}, line 81: got no JSON" in capsys.readouterr().err
