"""Accuracy per task of adapters on a running server, through its OpenAI API.

    hydraserve --model demo --adapter desk=examples/adapters/desk --adapter words=examples/adapters/words
    python examples/evaluate.py --data runs/data-800/desk/held_out.jsonl --models demo desk

An answer counts when it is exactly the expected text (surrounding white space apart). Greedy decoding. --json keeps
the numbers with where they come from; examples/compare.py makes tables of such files.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

from hydraserve.bench.machine import provenance

Row = dict[str, str]


def ask(client: openai.OpenAI, model: str, row: Row) -> str:
    """The model's answer to one question, in the `plain` template that the examples were trained with."""
    prompt = f"{row['instruction']}\n{row['input']}\n"
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=48, temperature=0)
    return answer.choices[0].text.strip()


def accuracy(client: openai.OpenAI, model: str, rows: Sequence[Row], workers: int) -> dict[str, float]:
    """task -> share of right answers."""
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(lambda row: ask(client, model, row), rows))
    right: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        right[row["task"]].append(answer == row["output"])
    return {task: sum(marks) / len(marks) for task, marks in sorted(right.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--data", type=Path, required=True, help="held_out.jsonl of a mixture")
    parser.add_argument("--models", nargs="+", required=True, help="names as the server lists them")
    parser.add_argument("--workers", type=int, default=8, help="requests at a time (default: 8)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.url, api_key=args.api_key)
    with args.data.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    table = {model: accuracy(client, model, rows, args.workers) for model in args.models}
    tasks = sorted({row["task"] for row in rows})
    print("| model | " + " | ".join(tasks) + " | all |")
    print("|---|" + "---|" * (len(tasks) + 1))
    for model, shares in table.items():
        mean = sum(shares.values()) / len(shares)
        print(f"| {model} | " + " | ".join(f"{shares[task]:.0%}" for task in tasks) + f" | {mean:.0%} |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record(rows, table), indent=1) + "\n", encoding="utf-8")


def record(rows: Sequence[Row], accuracies: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The numbers, and the machine, versions and commit they come from. questions: task -> how many were asked."""
    return {**provenance(), "questions": Counter(row["task"] for row in rows), "accuracy": accuracies}


if __name__ == "__main__":
    main()
