"""Train the example adapters; with --compare, HydraLoRA and plain LoRA with as many trainable parameters.

    python examples/train_examples.py --output runs
    python examples/train_examples.py --output runs --compare --seeds 0 1 2

The examples see 800 questions of each task. The comparison sees 200, because with 800 both methods answer nearly
everything. Adapters that are already there are kept, and an interrupted run goes on from its checkpoint, so the same
command can simply be given again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mixtures

from hydraserve.cli.main import main as hydraserve
from hydraserve.training.output import newest_checkpoint

EXAMPLE_PER_TASK, COMPARED_PER_TASK, HELD_OUT_PER_TASK = 800, 200, 100

COMMON = (
    "--template plain --packing --max-length 384 --batch-size 1 --epochs 1 --lr 2e-3 --warmup 0.05 --save-every 50 "
    "--save-dtype bfloat16 --base-name HuggingFaceTB/SmolLM2-135M-Instruct"
)
MLP = "--target-modules gate_proj up_proj down_proj"

# Run -> (mixture, options). Every run scales its delta by alpha / rank = 2.
EXAMPLES = {
    "desk": ("desk", "--heads 3 --rank 4 --alpha 8"),
    "words": ("words", f"--heads 4 --rank 4 --alpha 8 {MLP}"),
}
# The smallest ranks with at least as many trainable parameters: 2.91M and 3.05M for desk, 2.40M and 2.47M for words.
PLAIN = {
    "desk-lora": ("desk", "--method lora --rank 10 --alpha 20"),
    "words-lora": ("words", f"--method lora --rank 13 --alpha 26 {MLP}"),
}


def make_data(folder: Path, mixture: str, per_task: int) -> Path:
    """Write both parts of a mixture; returns the training file."""
    for part, held_out, count in (("train", False, per_task), ("held_out", True, HELD_OUT_PER_TASK)):
        mixtures.write(mixtures.records(mixture, held_out=held_out, per_task=count, seed=0), folder / f"{part}.jsonl")
    return folder / "train.jsonl"


def train(model: str, data: Path, output: Path, options: str, seed: int) -> None:
    """One run, unless its adapter is there already."""
    if (output / "adapter_config.json").exists():
        print(f"{output}: already there")
        return
    command = ["train", "--model", model, "--data", str(data), "--output", str(output)]
    command += [*COMMON.split(), *options.split(), "--seed", str(seed)]
    if newest_checkpoint(output / "checkpoints") is not None:
        command.append("--resume")
    print("hydraserve " + " ".join(command))
    if status := hydraserve(command):
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="base model (default: the demo model)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the data and the adapters")
    parser.add_argument("--compare", action="store_true", help="train the comparison instead of the examples")
    parser.add_argument("--only", nargs="+", help="names of runs (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--per-task", type=int, help="training questions of each task, other than 800 or 200")
    args = parser.parse_args()
    runs, per_task = (EXAMPLES | PLAIN, COMPARED_PER_TASK) if args.compare else (EXAMPLES, EXAMPLE_PER_TASK)
    per_task = args.per_task or per_task
    for seed in args.seeds:
        for name, (mixture, options) in runs.items():
            if args.only and name not in args.only:
                continue
            data = make_data(args.output / f"data-{per_task}" / mixture, mixture, per_task)
            folder = f"compare-{name}-seed{seed}" if args.compare else name if seed == 0 else f"{name}-seed{seed}"
            train(args.model, data, args.output / folder, options, seed)


if __name__ == "__main__":
    main()
