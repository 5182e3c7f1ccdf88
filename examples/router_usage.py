"""Which heads an adapter's router uses for which task, offline: one forward pass over questions and answers.

    python examples/router_usage.py examples/adapters/desk --data runs/data-800/desk/held_out.jsonl

Prints, for each task and kind of layer, each head's mean share of the answers' tokens, and how far the tasks' shares
are from one another (total variation distance: 0 the same, 1 disjoint).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hydraserve.bench.machine import provenance
from hydraserve.models import resolve_model
from hydraserve.tuner import record_routing

# task -> module -> [E], the mean routing weights
Usage = dict[str, dict[str, torch.Tensor]]


def usage_by_task(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> Usage:
    """Mean routing weights over the tokens of the answers, and those that lead to them."""
    sums: dict[str, dict[str, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        prompt = tokenizer(f"{row['instruction']}\n{row['input']}\n")["input_ids"]
        answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        with torch.no_grad(), record_routing(model) as routing:
            model(input_ids=torch.tensor([prompt + answer]))
        for module in routing.weights:
            sums[row["task"]][module].append(routing.tokens(module)[len(prompt) - 1 :].mean(0))
    return {
        task: {module: torch.stack(weights).mean(0) for module, weights in modules.items()}
        for task, modules in sums.items()
    }


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], kind: str) -> float:
    """Mean total variation distance of two tasks' shares over the layers of one kind."""
    distances = [(one[m] - other[m]).abs().sum().item() / 2 for m in one if m.endswith(kind)]
    return sum(distances) / len(distances)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="held_out.jsonl of a mixture")
    parser.add_argument("--model", default="demo", help="base model (default: the demo model)")
    parser.add_argument("--per-task", type=int, default=20, help="questions of each task (default: 20)")
    parser.add_argument("--json", type=Path, help="write every layer's shares to this file")
    args = parser.parse_args()
    source = resolve_model(args.model)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    by_task: dict[str, list[dict[str, str]]] = defaultdict(list)
    with args.data.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if len(by_task[row["task"]]) < args.per_task:
                by_task[row["task"]].append(row)
    rows = [row for group in by_task.values() for row in group]
    usage = usage_by_task(model, AutoTokenizer.from_pretrained(source), rows)
    report(usage)
    if args.json:
        args.json.write_text(json.dumps(record(usage, rows)) + "\n", encoding="utf-8")


def record(usage: Usage, rows: list[dict[str, str]]) -> dict[str, Any]:
    """The shares to four digits, and the machine, versions and commit they come from."""
    shares = {
        task: {module: [round(share, 4) for share in weights.tolist()] for module, weights in modules.items()}
        for task, modules in usage.items()
    }
    return {**provenance(), "questions": Counter(row["task"] for row in rows), "usage": shares}


def report(usage: Usage) -> None:
    """Print both tables."""
    kinds = sorted({module.rpartition(".")[2] for modules in usage.values() for module in modules})
    print("| task | " + " | ".join(kinds) + " |")
    print("|---|" + "---|" * len(kinds))
    for task, modules in sorted(usage.items()):
        cells = []
        for kind in kinds:
            shares = torch.stack([weights for module, weights in modules.items() if module.endswith(kind)]).mean(0)
            cells.append(" ".join(f"{share:.2f}" for share in shares.tolist()))
        print(f"| {task} | " + " | ".join(cells) + " |")
    print()
    for one, other in combinations(sorted(usage), 2):
        cells = [f"{kind} {distance(usage[one], usage[other], kind):.3f}" for kind in kinds]
        print(f"{one} / {other}: " + ", ".join(cells))


if __name__ == "__main__":
    main()
