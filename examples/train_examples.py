"""Train the example adapters, and for comparison plain LoRA with as many trainable parameters.

    python examples/train_examples.py --output runs                 # the two examples
    python examples/train_examples.py --output runs --compare --seeds 0 1 2

Adapters that are already there are kept, so an interrupted command can simply be given again. On one core of a
2024 server CPU a run takes 15 minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mixtures

from hydraserve.cli.main import main as hydraserve

TRAIN_PER_TASK, HELD_OUT_PER_TASK = 800, 100

COMMON = (
    "--template plain --packing --max-length 384 --batch-size 1 --epochs 1 --lr 2e-3 --warmup 0.05 --save-every 50 "
    "--save-dtype bfloat16 --base-name HuggingFaceTB/SmolLM2-135M-Instruct"
)
MLP = "--target-modules gate_proj up_proj down_proj"

# Run -> (mixture, options). Every run scales its delta by alpha / rank = 2. The ranks of plain LoRA are the smallest
# with at least as many trainable parameters: 2.91M and 3.05M for desk, 2.40M and 2.47M for words.
EXAMPLES = {
    "desk": ("desk", "--heads 3 --rank 4 --alpha 8"),
    "words": ("words", f"--heads 4 --rank 4 --alpha 8 {MLP}"),
}
COMPARISON = {
    "desk-lora": ("desk", "--method lora --rank 10 --alpha 20"),
    "words-lora": ("words", f"--method lora --rank 13 --alpha 26 {MLP}"),
}


def train(name: str, mixture: str, options: str, seed: int, args: argparse.Namespace) -> None:
    """One run, unless its adapter is there already."""
    folder = args.output / (name if seed == 0 else f"{name}-seed{seed}")
    if (folder / "adapter_config.json").exists():
        print(f"{folder}: already there")
        return
    data = args.output / "data" / mixture
    for part, held_out, count in (("train", False, TRAIN_PER_TASK), ("held_out", True, HELD_OUT_PER_TASK)):
        mixtures.write(mixtures.records(mixture, held_out=held_out, per_task=count, seed=0), data / f"{part}.jsonl")
    command = ["train", "--model", args.model, "--data", str(data / "train.jsonl"), "--output", str(folder)]
    command += [*COMMON.split(), *options.split(), "--seed", str(seed)]
    if (folder / "checkpoints").is_dir():
        command.append("--resume")
    print("hydraserve " + " ".join(command))
    if status := hydraserve(command):
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="base model (default: the demo model)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the data and the adapters")
    parser.add_argument("--compare", action="store_true", help="also plain LoRA of the same size")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    for seed in args.seeds:
        for name, (mixture, options) in (EXAMPLES | (COMPARISON if args.compare else {})).items():
            train(name, mixture, options, seed, args)


if __name__ == "__main__":
    main()
