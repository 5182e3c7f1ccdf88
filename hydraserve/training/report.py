"""Tables that the training commands print."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hydraserve.training.run import TrainSummary


def print_summary(summary: TrainSummary, console: Console) -> None:
    """What a training run did."""
    table = Table(title=f"adapter in {summary.output}", show_header=False, title_justify="left")
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


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
