"""`hydraserve convert`: the same adapter in another file format, without loss."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "convert an adapter between the authors' layout and PEFT's, without loss"

TARGETS = ("hydralora", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="folder of the adapter, or of the training run that made it")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument(
        "--to",
        required=True,
        choices=TARGETS,
        help="hydralora: the layout of the authors' code; peft: what hydraserve.tuner loads (plain LoRA: PEFT's LoRA)",
    )
    parser.add_argument("--safetensors", action="store_true", help="with --to hydralora: safetensors, not .bin")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is already there")


def run(args: argparse.Namespace) -> int:
    """Write the adapter, read it back, and compare the two.

    Raises ConfigError when there is an adapter at the target already, AdapterError's subclasses for adapters that
    cannot be read or that the other layout cannot hold.
    """
    from hydraserve.adapters.checkpoint import load_adapter, save_hydralora, save_lora
    from hydraserve.adapters.formats.peft import save_peft
    from hydraserve.adapters.locate import CONFIG_NAME
    from hydraserve.errors import AdapterError, ConfigError

    if (args.target / CONFIG_NAME).exists() and not args.overwrite:
        raise ConfigError("target", got=f"{args.target}, which holds an adapter", expected="none", fix="--overwrite")
    adapter = load_adapter(args.source)
    if args.to == "hydralora":
        save_hydralora(adapter, args.target, safetensors=args.safetensors)
    elif adapter.format == "lora":
        save_lora(adapter, args.target)
    else:
        save_peft(adapter, args.target)
    written = load_adapter(args.target)
    if written.digest != adapter.digest:
        raise AdapterError(
            f"converting {args.source}",
            got=f"digest {written.digest[:12]} of what was written",
            expected=f"{adapter.digest[:12]}, that of the source",
            fix="keep the source; the written copy differs from it",
        )
    print(f"{args.source} ({adapter.format}) -> {args.target} ({written.format})")
    print(f"{len(adapter.modules)} modules, {adapter.nbytes / 1e6:.2f} MB, digest {adapter.digest[:12]}: equal")
    return 0
