"""Tables that the training commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from hydraserve.training.heads import HeadsChoice
    from hydraserve.training.run import TrainSummary


def print_summary(summary: TrainSummary, console: Console) -> None:
    """What a training run did."""
    table = Table(title=escape(f"adapter in {summary.output}"), show_header=False, title_justify="left")
    heads = f", {summary.heads} heads" if summary.method == "hydralora" else ""
    rows = {
        "method": summary.method + heads,
        "trainable parameters": f"{summary.trainable_parameters:,}",
        "size on disk": f"{summary.adapter_bytes / 1e6:.2f} MB",
        "examples": f"{summary.examples:,} trained, {summary.eval_examples:,} for evaluation",
        "cut, dropped": f"{summary.cut_examples:,}, {summary.dropped_examples:,}",
        "tokens trained on": f"{summary.trained_tokens:,} an epoch",
        "steps": f"{summary.steps:,}",
        "loss": f"{_number(summary.first_loss)} to {_number(summary.last_loss)}",
        "evaluation loss": _number(summary.eval_loss),
        "time": f"{summary.seconds:.0f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def print_heads(choice: HeadsChoice, console: Console) -> None:
    """How the number of heads was chosen: the curve with its elbow, or what DBSCAN found."""
    if choice.candidates:
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("heads", "distance", "silhouette", ""):
            table.add_column(name, justify="left" if not name else "right")
        for c in choice.candidates:
            marks = {"elbow": c.k == choice.heads, "most separate": c.k == choice.best_silhouette}
            silhouette = "" if c.silhouette is None else f"{c.silhouette:.3f}"
            note = ", ".join(name for name, holds in marks.items() if holds)
            table.add_row(str(c.k), f"{c.inertia:.1f}", silhouette, note)
        console.print(table)
    else:
        console.print(f"dense groups; {choice.noise:.0%} of the examples are in none")
    console.print(f"suggested: --heads {choice.heads} ({choice.examples:,} examples)", highlight=False)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
