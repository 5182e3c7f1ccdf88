"""`hydraserve heads`: how many heads the training data calls for."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "suggest the number of heads from the training data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from hydraserve.training.settings import HEADS_METHODS

    parser.add_argument(
        "--data", required=True, nargs="+", type=Path, help="JSON or JSONL files, alpaca or ShareGPT/messages form"
    )
    parser.add_argument("--method", choices=HEADS_METHODS, default="kmeans", help="(default: kmeans)")
    parser.add_argument("--max-heads", type=int, default=10, help="largest number to try (default: 10)")
    parser.add_argument("--plot", type=Path, help="where to write k-means' curve, a PNG (default: heads.png)")
    parser.add_argument("--seed", type=int, default=0, help="of k-means and of samples (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Print the suggestion. Raises DataError for unusable data, ConfigError for unusable options."""
    from rich.console import Console

    from hydraserve.errors import ConfigError
    from hydraserve.training.data import load_examples
    from hydraserve.training.heads import choose_heads, plot
    from hydraserve.training.output import writable_folder
    from hydraserve.training.report import print_heads

    if args.max_heads < 3:
        raise ConfigError("--max-heads", got=args.max_heads, expected="at least 3: an elbow needs a curve")
    if args.plot and args.method == "dbscan":
        raise ConfigError("--plot", got="--method dbscan, which has no curve", expected="--method kmeans")
    path = args.plot or Path("heads.png")
    if args.method == "kmeans":
        writable_folder(path.parent, "--plot")
    choice = choose_heads(load_examples(args.data), method=args.method, max_heads=args.max_heads, seed=args.seed)
    print_heads(choice, Console())
    if choice.candidates:
        plot(choice, path)
        print(f"curve: {path}")
    return 0
