"""`hydraserve analyze`: are the A's alike and the B's not? The picture and the number of the HydraLoRA paper."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "compare the A's and the B's of adapters: t-SNE picture and asymmetry"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="[NAME=]PATH", help="adapters of one base, HydraLoRA or LoRA")
    parser.add_argument("--output", required=True, type=Path, help="folder for asymmetry.png and asymmetry.json")
    parser.add_argument("--perplexity", type=float, default=30.0, help="of t-SNE (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Write both files and print the numbers.

    Raises ConfigError for options that cannot be, names that are given twice or adapters of different bases,
    AdapterError's subclasses for adapters that cannot be read.
    """
    import json
    import math
    from dataclasses import asdict

    from hydraserve.adapters.checkpoint import load_adapter
    from hydraserve.errors import ConfigError
    from hydraserve.training.asymmetry import Similarity, analyze, plot
    from hydraserve.training.output import writable_folder

    if not 0 < args.perplexity < math.inf:
        raise ConfigError("--perplexity", got=args.perplexity, expected="more than 0")
    writable_folder(args.output, "--output")
    adapters = {}
    for text in args.adapters:
        name, separator, path = text.partition("=")
        name = name if separator else Path(text).resolve().name
        if name in adapters:
            raise ConfigError("adapters", got=f"two named {name}", expected="different names", fix="NAME=PATH")
        adapters[name] = load_adapter(path or text)
    result = analyze(adapters, perplexity=args.perplexity, seed=args.seed)
    plot(result, args.output / "asymmetry.png")
    (args.output / "asymmetry.json").write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")

    def shown(similarity: Similarity) -> str:
        parts = {"across adapters": similarity.across, "between heads": similarity.within}
        return (
            ", ".join(f"{value:.3f} {name}" for name, value in parts.items() if value is not None)
            or "nothing to compare"
        )

    print(f"A alike: {shown(result.a)}")
    print(f"B alike: {shown(result.b)}")
    if result.asymmetry is not None:
        print(f"asymmetry (A less B, across adapters): {result.asymmetry:.3f}")
    print(f"{args.output / 'asymmetry.png'}, {args.output / 'asymmetry.json'}")
    return 0
