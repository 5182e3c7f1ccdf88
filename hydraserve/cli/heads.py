"""`hydraserve heads`: how many heads the training data calls for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from hydraserve.training.heads import HeadsChoice

HELP = "suggest the number of heads from the training data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, nargs="+", type=Path, help="JSON or JSONL files, alpaca or ShareGPT/messages form"
    )
    parser.add_argument("--method", choices=("kmeans", "dbscan"), default="kmeans", help="(default: kmeans)")
    parser.add_argument("--max-heads", type=int, default=10, help="largest number to try (default: 10)")
    parser.add_argument("--plot", type=Path, help="write the curve as a PNG (k-means only)")
    parser.add_argument("--seed", type=int, default=0, help="of k-means and of samples (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Print the suggestion. Raises DataError for unusable data, ConfigError for unusable options."""
    from rich.console import Console

    from hydraserve.errors import ConfigError
    from hydraserve.training.data import load_examples
    from hydraserve.training.heads import choose_heads, plot

    if args.max_heads < 3:
        raise ConfigError("--max-heads", got=args.max_heads, expected="at least 3: an elbow needs a curve")
    if args.plot and args.method == "dbscan":
        raise ConfigError("--plot", got="--method dbscan, which has no curve", expected="--method kmeans")
    choice = choose_heads(load_examples(args.data), method=args.method, max_heads=args.max_heads, seed=args.seed)
    _print(choice, Console())
    if args.plot:
        plot(choice, args.plot)
        print(f"curve: {args.plot}")
    return 0


def _print(choice: HeadsChoice, console: Console) -> None:
    from rich import box
    from rich.table import Table

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
