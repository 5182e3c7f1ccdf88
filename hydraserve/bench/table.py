"""A result as a table: on the terminal, or as Markdown for a document."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import IO, Any

# heading, metric, digits after the point, whether its ratio to the baseline is shown
_COLUMNS = (
    ("tok/s", "output_tokens_per_s", 1, True),
    ("TPOT ms", "tpot_ms.p50", 1, True),
    ("TTFT ms", "ttft_ms.p50", 0, True),
    ("ITL p99 ms", "itl_ms.p99", 1, False),
    ("goodput/s", "goodput_per_s", 2, False),
)
# Above this share of the processor, neighbours move the numbers by more than what is measured.
_NOISY = 0.05

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
    where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{result['model']} on {where}"


def headings(result: Mapping[str, Any]) -> list[str]:
    open_loop = any(cell["load"]["rate"] is not None for cell in result["cells"])
    names = ["requests/s" if open_loop else "batch", "arm"]
    for heading, metric, _, with_ratio in _shown(result):
        names.append(heading)
        if with_ratio and any(metric in cell["ratios"] for cell in result["cells"]):
            names.append(f"/ {result['baseline']}")
    return [*names, "memory"]


def row(result: Mapping[str, Any], cell: Mapping[str, Any]) -> list[str]:
    """One cell: medians over the repeats, with half their range."""
    cells = [f"{load_value(cell):g}", cell["label"]]
    for _, metric, digits, with_ratio in _shown(result):
        cells.append(_spread(cell["over_repeats"].get(metric), digits))
        if with_ratio and any(metric in other["ratios"] for other in result["cells"]):
            cells.append(_spread(cell["ratios"].get(metric), 2))
    memory = cell["over_repeats"].get("memory_pss_bytes")
    return [*cells, f"{memory['max'] / 2**30:.2f} GiB" if memory else "-"]


def notes(result: Mapping[str, Any]) -> list[str]:
    """What has to be said below the table."""
    lines = []
    if not result["complete"]:
        lines.append(f"PARTIAL: stopped by {result['stopped_by']} before all repeats were done.")
    repeats = {len(cell["runs"]) for cell in result["cells"]}
    lines.append(
        f"Medians of {_range(repeats)} repeats, ± half their range; ratios are taken repeat by repeat. "
        f"{_workload(result)} "
        f"Engine flags of every server: {' '.join(result['engine_flags']) or 'none'}."
    )
    failed = sum(run["metrics"]["failed"] or 0 for cell in result["cells"] for run in cell["runs"])
    if failed:
        lines.append(f"FAILED REQUESTS: {failed:.0f}; the first errors are in the result file.")
    shares = [run["metrics"].get("other_processes_cpu_share") for cell in result["cells"] for run in cell["runs"]]
    worst = max((share for share in shares if share is not None), default=0.0)
    if worst > _NOISY:
        lines.append(f"NOISY: other processes took up to {worst:.0%} of the processor during a run.")
    return lines


def load_value(cell: Mapping[str, Any]) -> float:
    """The concurrency of a closed loop, the rate of an open one."""
    load = cell["load"]
    return float(load["rate"] if load["concurrency"] is None else load["concurrency"])


def _shown(result: Mapping[str, Any]) -> list[tuple[str, str, int, bool]]:
    """The columns that any cell has a number for."""
    return [column for column in _COLUMNS if any(column[1] in cell["over_repeats"] for cell in result["cells"])]


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
