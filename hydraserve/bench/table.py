"""A result as a table: on the terminal, or as Markdown for a document."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import IO, Any

from hydraserve.bench.machine import processor


@dataclass(frozen=True)
class Column:
    """heading; metric: whose median is shown with half its range, rounded to `digits` after the point; with_ratio: the
    ratio to the baseline follows; size: bytes, of which the largest of the repeats is shown; if_any: only shown when
    it is not 0 everywhere."""

    heading: str
    metric: str
    digits: int = 0
    with_ratio: bool = False
    size: bool = False
    if_any: bool = False

    def text(self, spread: Mapping[str, float] | None) -> str:
        if spread is not None and self.size:
            return f"{spread['max'] / 2**30:.2f} GiB"
        return _spread(spread, self.digits)


_COLUMNS = (
    Column("tok/s", "output_tokens_per_s", 1, with_ratio=True),
    Column("TPOT ms", "tpot_ms.p50", 1, with_ratio=True),
    Column("TTFT ms", "ttft_ms.p50", 0, with_ratio=True),
    Column("ITL p99 ms", "itl_ms.p99", 1),
    Column("goodput/s", "goodput_per_s", 2),
    Column("loads", "adapter_loads", if_any=True),
    Column("memory", "memory_pss_bytes", size=True),
    Column("peak", "run_peak_bytes", size=True),
    Column("GPU memory", "gpu_memory_bytes", size=True),
)
# Above this share of the processor, neighbours move the numbers by more than what is measured.
_NOISY = 0.05
# What the client needs to send some requests that are due at one time; more is a client, or a machine, that cannot keep
# up with the rate.
_LATE_MS = 50.0

WIDTH = 140  # of what goes into a file; on a terminal, its own


def show(result: Mapping[str, Any], file: IO[str] | None = None) -> None:
    """Print the table with what has to be known to read it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file or sys.stdout, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(title=title(result), box=box.SIMPLE_HEAD)
    for i, heading in enumerate(headings(result)):
        table.add_column(heading, justify="left" if i == 1 else "right")
    for _, cells in groupby(result["cells"], load_value):
        for cell in cells:
            table.add_row(*row(result, cell))
        table.add_section()
    console.print(table)
    for line in notes(result):
        console.print(line)


def markdown(result: Mapping[str, Any]) -> str:
    """The same table and notes."""
    head = headings(result)
    lines = [_bar(head), _bar(["---:", "---", *["---:"] * (len(head) - 2)])]
    lines += [_bar(row(result, cell)) for cell in result["cells"]]
    return "\n\n".join(["\n".join(lines), *notes(result)]) + "\n"


def title(result: Mapping[str, Any]) -> str:
    machine = result["provenance"]["machine"]
    return f"{result['model']} on {', '.join(machine['gpus']) or processor(machine)}"


def headings(result: Mapping[str, Any]) -> list[str]:
    open_loop = any(cell["load"]["rate"] is not None for cell in result["cells"])
    names = ["requests/s" if open_loop else "batch", "arm"]
    for column in _shown(result):
        names.append(column.heading)
        if _has_ratio(column, result):
            names.append(f"/ {result['baseline']}")
    return names


def row(result: Mapping[str, Any], cell: Mapping[str, Any]) -> list[str]:
    """One cell: medians over the repeats, with half their range; of sizes the largest."""
    cells = [f"{load_value(cell):g}", cell["label"]]
    for column in _shown(result):
        cells.append(column.text(cell["over_repeats"].get(column.metric)))
        if _has_ratio(column, result):
            cells.append(_spread(cell["ratios"].get(column.metric), 2))
    return cells


def notes(result: Mapping[str, Any]) -> list[str]:
    """What has to be said below the table."""
    lines = []
    if not result["complete"]:
        lines.append(f"PARTIAL: stopped by {result['stopped_by']} before all repeats were done.")
    repeats = {len(cell["runs"]) for cell in result["cells"]}
    lines.append(
        f"Medians of {_range(repeats)} repeats, ± half their range; {_pairing(result)} "
        f"{_workload(result)} "
        f"Engine flags of every server: {' '.join(result['engine_flags']) or 'none'}."
    )
    lines += _left_out(result)
    failed = sum(run["metrics"]["failed"] or 0 for cell in result["cells"] for run in cell["runs"])
    if failed:
        lines.append(f"FAILED REQUESTS: {failed:.0f}; the first errors are in the result file.")
    worst = _largest(result, "other_processes_cpu_share")
    if worst > _NOISY:
        lines.append(f"NOISY: other processes took up to {worst:.0%} of the processor during a run.")
    lag = _largest(result, "send_lag_ms.max")
    if lag > _LATE_MS:
        lines.append(
            f"LATE: the client sent requests up to {lag:.0f} ms after they were due; their times include that."
        )
    return lines


def _largest(result: Mapping[str, Any], metric: str) -> float:
    """Of all runs; 0 where none has it."""
    found = [run["metrics"].get(metric) for cell in result["cells"] for run in cell["runs"]]
    return max((value for value in found if value is not None), default=0.0)


def _pairing(result: Mapping[str, Any]) -> str:
    """How the ratios came about."""
    if result.get("interleaved", True):
        return "ratios are taken repeat by repeat."
    return "the servers ran one after the other, so ratios are between runs that lie far apart in time."


def _left_out(result: Mapping[str, Any]) -> list[str]:
    """What was asked for and is not in the table: a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for item in result.get("left_out", ()):  # results of earlier versions do not say
        unit = "batch" if item["load"]["rate"] is None else "requests/s"
        reasons.setdefault(item["why"], []).append(f"{item['label']} ({unit} {load_value(item):g})")
    return [f"NOT MEASURED, as {why}: {'; '.join(cells)}." for why, cells in reasons.items()]


def load_value(cell: Mapping[str, Any]) -> float:
    """The concurrency of a closed loop, the rate of an open one."""
    load = cell["load"]
    return float(load["rate"] if load["concurrency"] is None else load["concurrency"])


def _shown(result: Mapping[str, Any]) -> list[Column]:
    """The columns that any cell has a number for."""
    return [column for column in _COLUMNS if any(_has(column, cell) for cell in result["cells"])]


def _has(column: Column, cell: Mapping[str, Any]) -> bool:
    spread = cell["over_repeats"].get(column.metric)
    return spread is not None and (spread["max"] > 0 or not column.if_any)


def _has_ratio(column: Column, result: Mapping[str, Any]) -> bool:
    return column.with_ratio and any(column.metric in cell["ratios"] for cell in result["cells"])


def _spread(value: Mapping[str, float] | None, digits: int) -> str:
    if value is None:
        return "-"
    middle, half = value["median"], (value["max"] - value["min"]) / 2
    return f"{middle:.{digits}f}" + (f" ±{half / middle:.0%}" if half and middle else "")


def _workload(result: Mapping[str, Any]) -> str:
    workload = result["workload"]
    if "conversations" in workload:
        lengths = f"{workload['conversations']} conversations from a file"
    else:
        lengths = f"Prompts of {workload['input_len']} tokens, answers of {workload['output_len']}"
    return f"{lengths}, adapters {workload['popularity']}."


def _range(numbers: Iterable[int]) -> str:
    low, high = min(numbers, default=0), max(numbers, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _bar(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
