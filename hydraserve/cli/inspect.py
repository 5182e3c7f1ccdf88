"""`hydraserve inspect`: sizes of an adapter, and whether its heads differ."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from hydraserve.adapters.checkpoint import AdapterSummary
    from hydraserve.training.inspection import AdapterReport, ModuleReport

HELP = "show an adapter's modules, sizes, and how much its heads differ"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="folder of the adapter, or of the training run that made it")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report. Raises AdapterError's subclasses for an adapter that cannot be read."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from hydraserve.adapters.checkpoint import inspect_adapter, load_adapter
    from hydraserve.training.inspection import inspect_weights

    summary = inspect_adapter(args.adapter)
    report = inspect_weights(load_adapter(args.adapter))
    if args.json:
        print(json.dumps({**asdict(report), "reason": summary.reason, "note": summary.note}, indent=2))
    else:
        _print(report, summary, Console())
    return 0


def _print(report: AdapterReport, summary: AdapterSummary, console: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    name = f"{report.source}: {report.format}, base model {report.base_model or 'not stated'}"
    console.print(name, markup=False, highlight=False, soft_wrap=True)
    console.print(f"recognised by {summary.reason}", markup=False, highlight=False, soft_wrap=True)
    if summary.note:
        console.print(summary.note, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{len(report.modules)} modules, {report.parameters:,} parameters, {report.nbytes / 1e6:.2f} MB, "
        f"digest {report.digest[:12]}",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    prefix = _common_prefix([module.module for module in report.modules])
    table.add_column(escape(f"module{' in ' + prefix if prefix else ''}"), no_wrap=True)
    for name in ("rank", "heads", "params", "bytes", "norm", "alike", "router"):
        table.add_column(name, justify="right", no_wrap=True)
    for module in report.modules:
        table.add_row(escape(module.module.removeprefix(f"{prefix}.")), *_cells(module))
    console.print(table)
    console.print("norm: of s B A, smallest and largest head. alike: mean cosine between heads. router: its norm.")
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _cells(module: ModuleReport) -> tuple[str, ...]:
    low, high = min(module.head_norms), max(module.head_norms)
    return (
        str(module.rank),
        str(module.heads),
        f"{module.parameters:,}",
        f"{module.nbytes:,}",
        f"{low:.3g}" if module.heads == 1 else f"{low:.2g}-{high:.2g}",
        "" if module.similarity is None else f"{module.similarity:.3f}",
        "" if module.router_norm is None else f"{module.router_norm:.3g}",
    )


def _common_prefix(paths: list[str]) -> str:
    """What all dotted paths begin with, at most all but their last two components: "model.layers"."""
    common = []
    for parts in zip(*(path.split(".")[:-2] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
