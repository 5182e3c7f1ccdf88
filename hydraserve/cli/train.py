"""`hydraserve train`: train a HydraLoRA (or plain LoRA) adapter from the command line."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

HELP = "train a HydraLoRA or plain LoRA adapter on instruction data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options in groups; the defaults are those of `TrainSettings`."""
    from hydraserve.training.settings import DTYPES, HEADS_METHODS, METHODS, SCHEDULERS, TrainSettings

    default: dict[str, Any] = {f.name: f.default for f in fields(TrainSettings)}

    def add(group: Any, name: str, text: str, **options: Any) -> None:
        value = default[name]
        shown = "" if value in (False, None, ()) else f" (default: {value})"
        group.add_argument(f"--{name.replace('_', '-')}", help=text + shown, default=value, **options)

    parser.add_argument(
        "--model", required=True, help="base model: a short name (`hydraserve models`), a Hugging Face name or a folder"
    )
    parser.add_argument(
        "--data", required=True, nargs="+", type=Path, help="JSON or JSONL files, alpaca or ShareGPT/messages form"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for the adapter")

    adapter = parser.add_argument_group("adapter")
    add(adapter, "method", "hydralora, or lora for comparison", choices=METHODS)
    add(adapter, "heads", 'number of heads, or "auto" to choose it from the data', type=_heads)
    add(adapter, "heads_method", "how --heads auto chooses", choices=HEADS_METHODS)
    add(adapter, "max_heads", "largest number that --heads auto tries with k-means", type=int)
    add(adapter, "rank", "rank of A and of each head", type=int)
    add(adapter, "alpha", "the delta is scaled by alpha / rank", type=float)
    add(adapter, "dropout", "dropout on the adapter's input", type=float)
    add(adapter, "rslora", "scale by alpha / sqrt(rank)", action="store_true")
    add(adapter, "target_modules", "layers to adapt; all linear ones when not given", nargs="+")
    add(adapter, "load_balance", "weight of the load-balancing loss", type=float)
    add(adapter, "router_z", "weight of the router z-loss", type=float)

    data = parser.add_argument_group("data")
    add(data, "template", "chat, alpaca or plain; auto: chat where the tokenizer has one", type=str)
    add(data, "max_length", "longest example in tokens; longer ones are cut", type=int)
    add(data, "packing", "several examples to a row of --max-length tokens", action="store_true")
    add(data, "eval_share", "share of the examples set aside for evaluation", type=float)

    course = parser.add_argument_group("course")
    add(course, "epochs", "times through the data", type=float)
    add(course, "max_steps", "stop after so many steps instead", type=int)
    add(course, "batch_size", "rows in one pass", type=int)
    add(course, "accumulate", "passes in one step", type=int)
    add(course, "lr", "highest learning rate", type=float)
    add(course, "scheduler", "course of the learning rate", choices=SCHEDULERS)
    add(course, "warmup", "share of the steps in which it rises", type=float)
    add(course, "weight_decay", "weight decay of the optimiser", type=float)
    add(course, "seed", "of data order, initial weights and dropout", type=int)
    add(course, "dtype", "type of the base model's weights", choices=DTYPES)
    add(course, "gradient_checkpointing", "less memory, more time", action="store_true")

    output = parser.add_argument_group("output")
    add(output, "log_every", "steps between log lines", type=int)
    add(output, "eval_every", "steps between evaluations; 0: at the end of each epoch", type=int)
    add(output, "save_every", "steps between checkpoints; 0: none", type=int)
    add(output, "resume", "go on from the newest checkpoint in --output", action="store_true")
    add(output, "overwrite", "replace an adapter and checkpoints that are in --output", action="store_true")
    add(output, "save_dtype", "type of the saved adapter's weights", choices=DTYPES)
    add(
        output,
        "base_name",
        "the base model's name that the adapter states (default: --model, a short name in full)",
        type=str,
    )


def run(args: argparse.Namespace) -> int:
    """Train, and print what came of it."""
    from rich.console import Console

    from hydraserve.training.settings import TrainSettings

    values = {f.name: getattr(args, f.name) for f in fields(TrainSettings)}
    values["data"], values["target_modules"] = tuple(args.data), tuple(args.target_modules)
    settings = TrainSettings(**values)
    console = Console()

    from hydraserve.training.report import print_summary
    from hydraserve.training.run import train

    print_summary(train(settings, console), console)
    return 0


def _heads(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'got {text!r}, expected a whole number or "auto"') from None
