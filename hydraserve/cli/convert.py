"""`hydraserve convert`: the same adapter in another file format, without loss."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydraserve.adapters.weights import HydraAdapter

HELP = "convert an adapter to another file format, without loss"

TARGETS = {
    "hydralora": "the layout of the authors' code",
    "peft": "what hydraserve.tuner loads (of plain LoRA: PEFT's LoRA)",
    "lora": "PEFT's LoRA",
    "loramoe": "LoRAMoE: one A for each head",
    "molora": "MoLoRA: any gate that can be served",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="folder of the adapter, or of the training run that made it")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument(
        "--to",
        required=True,
        choices=sorted(TARGETS),
        help="; ".join(f"{name}: {what}" for name, what in TARGETS.items()),
    )
    parser.add_argument(
        "--safetensors", action="store_true", help="with --to hydralora and loramoe: safetensors, not .bin"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is already there")


def run(args: argparse.Namespace) -> int:
    """Write the adapter beside the target, read it back, compare the two, and only then put it there.

    Raises ConfigError when there is an adapter at the target already, AdapterError's subclasses for adapters that
    cannot be read or that the other layout cannot hold.
    """
    from hydraserve.adapters.checkpoint import load_adapter
    from hydraserve.adapters.locate import CONFIG_NAME
    from hydraserve.errors import AdapterError, ConfigError

    target: Path = args.target
    if (target / CONFIG_NAME).exists() and not args.overwrite:
        raise ConfigError("target", got=f"{target}, which holds an adapter", expected="none", fix="--overwrite")
    adapter = load_adapter(args.source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        draft = Path(folder) / "adapter"
        _save(adapter, draft, args)
        written = load_adapter(draft)
        if written.digest != adapter.digest:
            raise AdapterError(
                f"converting {args.source}",
                got=f"digest {written.digest[:12]} of what was written",
                expected=f"{adapter.digest[:12]}, that of the source",
                fix="nothing was kept: this format cannot hold the adapter to the last bit; --to molora can",
            )
        _put(draft, target)
    print(f"{args.source} ({adapter.format}) -> {target} ({written.format})")
    print(f"{len(adapter.modules)} modules, {adapter.nbytes / 1e6:.2f} MB, digest {adapter.digest[:12]}: equal")
    return 0


def _put(draft: Path, target: Path) -> None:
    """Move the files of `draft` to `target`, the configuration last. Other weights that lie there are removed: a reader
    would not know which ones count."""
    from hydraserve.adapters.locate import CONFIG_NAME, WEIGHTS_NAMES

    target.mkdir(exist_ok=True)
    for name in (CONFIG_NAME, *WEIGHTS_NAMES):
        (target / name).unlink(missing_ok=True)
    for file in sorted(draft.iterdir(), key=lambda file: file.name == CONFIG_NAME):
        os.replace(file, target / file.name)


def _save(adapter: HydraAdapter, target: Path, args: argparse.Namespace) -> None:
    from hydraserve.adapters.formats.molora import save_molora
    from hydraserve.adapters.formats.peft import save_peft
    from hydraserve.adapters.save import save_hydralora, save_lora, save_loramoe

    dropout = _dropout(adapter)
    if args.to in ("hydralora", "loramoe"):
        save = save_hydralora if args.to == "hydralora" else save_loramoe
        save(adapter, target, safetensors=args.safetensors, lora_dropout=dropout)
    elif args.to == "molora":
        save_molora(adapter, target)
    elif args.to == "lora" or adapter.format == "lora":
        save_lora(adapter, target, lora_dropout=dropout)
    else:
        save_peft(adapter, target, lora_dropout=dropout)


def _dropout(adapter: HydraAdapter) -> float:
    """lora_dropout of the source, which matters when training goes on; 0 where it states none."""
    from hydraserve.adapters.config import read_config
    from hydraserve.adapters.limits import DEFAULT_LIMITS
    from hydraserve.adapters.locate import CONFIG_NAME

    value = read_config(adapter.source / CONFIG_NAME, DEFAULT_LIMITS).fields.get("lora_dropout")
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1 else 0.0
