"""A table of results of examples/evaluate.py, runs that differ in their seed only taken together.

    python examples/compare.py examples/results/accuracy-*.json
    python examples/compare.py examples/results/accuracy-desk-200.json

Each cell is the mean accuracy over the seeds, and the range where there are several.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

Accuracy = dict[str, float]  # task -> share of right answers


def by_method(accuracies: dict[str, Accuracy]) -> dict[str, list[Accuracy]]:
    """Name without its seed -> one entry a seed; `all` is the mean over the tasks."""
    groups: dict[str, list[Accuracy]] = defaultdict(list)
    for model, tasks in accuracies.items():
        groups[re.sub(r"-seed\d+$", "", model)].append(tasks | {"all": sum(tasks.values()) / len(tasks)})
    return dict(groups)


def cell(shares: list[float]) -> str:
    """`93.0%`, or with several seeds `93.0% (91.0-95.0)`."""
    mean = f"{sum(shares) / len(shares):.1%}"
    return mean if len(shares) == 1 else f"{mean} ({100 * min(shares):.1f}-{100 * max(shares):.1f})"


def table(accuracies: dict[str, Accuracy]) -> str:
    """The Markdown table of one result file."""
    groups = by_method(accuracies)
    tasks = list(next(iter(groups.values()))[0])
    lines = ["| model | seeds | " + " | ".join(tasks) + " |", "|---|---|" + "---|" * len(tasks)]
    for name, runs in groups.items():
        cells = [cell([run[task] for run in runs]) for task in tasks]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files that evaluate.py --json wrote")
    for path in parser.parse_args().results:
        print(f"{path}\n\n{table(json.loads(path.read_text(encoding='utf-8'))['accuracy'])}\n")


if __name__ == "__main__":
    main()
