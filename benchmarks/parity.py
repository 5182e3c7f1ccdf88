"""A server's answers against recorded ones: tokens and log-probabilities of greedy completions.

    python benchmarks/parity.py --url http://127.0.0.1:8000 --model oracle --dtype bfloat16 \\
        --expected tests/oracle/expected/mlp_r2_e2.json

The recorded file holds, for each dtype, prompts as token ids, the greedy tokens, and for every step the most likely
tokens with their log-probabilities. Texts are compared up to the first token that differs: from there on they are
answers to different questions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai

from hydraserve.bench.machine import provenance


@dataclass(frozen=True)
class Agreement:
    """One prompt.

    tokens:        recorded; equal: how many of them came before the first that differs.
    margin:        recorded log-probability of the best token less that of the second at that step; None: none differs.
    compared:      log-probabilities that could be compared; missing: those the server did not answer with.
    worst, mean:   of their absolute differences, nats.
    reference_worst: the same between two ways of computing it in the reference.
    """

    name: str
    tokens: int
    equal: int
    margin: float | None
    compared: int
    missing: int
    worst: float
    mean: float
    reference_worst: float


def ask(client: openai.OpenAI, model: str, case: Mapping[str, Any]) -> tuple[list[int], list[dict[str, float]]]:
    """Greedy token ids, and for each step {"token_id:N": log-probability} of the most likely."""
    answer = client.completions.create(
        model=model,
        prompt=case["prompt_token_ids"],
        max_tokens=len(case["generated_token_ids"]),
        temperature=0,
        logprobs=len(case["steps"][0]["top20_ids"]),
        extra_body={"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True},
    ).choices[0]
    return answer.token_ids, answer.logprobs.top_logprobs  # type: ignore[attr-defined,union-attr,return-value]


def agreement(case: Mapping[str, Any], tokens: Sequence[int], logprobs: Sequence[Mapping[str, float]]) -> Agreement:
    """The answer to one prompt against what was recorded."""
    equal, margin, missing = 0, None, 0
    differences: list[float] = []
    for recorded, expected, token, top in zip(
        case["steps"], case["generated_token_ids"], tokens, logprobs, strict=True
    ):
        for token_id, logprob in zip(recorded["top20_ids"], recorded["top20_logprobs"], strict=True):
            got = top.get(f"token_id:{token_id}")
            if got is None:
                missing += 1
            else:
                differences.append(abs(got - logprob))
        if token != expected:
            margin = float(recorded["margin"])
            break
        equal += 1
    return Agreement(
        name=case["name"],
        tokens=len(case["generated_token_ids"]),
        equal=equal,
        margin=margin,
        compared=len(differences),
        missing=missing,
        worst=max(differences),
        mean=sum(differences) / len(differences),
        reference_worst=float(case["max_abs_logprob_diff_cached_vs_full_forward"]),
    )


def compare(client: openai.OpenAI, model: str, cases: Sequence[Mapping[str, Any]]) -> list[Agreement]:
    """All prompts at once: one batch, as a server meets them."""
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(lambda case: ask(client, model, case), cases))
    return [agreement(case, *answer) for case, answer in zip(cases, answers, strict=True)]


def summary(found: Sequence[Agreement]) -> dict[str, float | int]:
    """All prompts in one line."""
    compared = sum(a.compared for a in found)
    return {
        "tokens": sum(a.tokens for a in found),
        "equal": sum(a.equal for a in found),
        "worst_nats": max(a.worst for a in found),
        "mean_nats": sum(a.mean * a.compared for a in found) / compared,
        "reference_worst_nats": max(a.reference_worst for a in found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True, help="the adapter's name")
    parser.add_argument("--expected", required=True, type=Path, help="the recorded answers")
    parser.add_argument("--dtype", default="float32", help="of the server, and which recording is meant")
    parser.add_argument("--output", type=Path, help="JSON with every prompt")
    args = parser.parse_args()
    cases = json.loads(args.expected.read_text())["results"][args.dtype]
    client = openai.OpenAI(base_url=f"{args.url}/v1", api_key="none", timeout=600, max_retries=0)
    found = compare(client, args.model, cases)
    for a in found:
        differs = "" if a.margin is None else f", then a token whose margin was {a.margin:.3f}"
        print(f"{a.name:14} {a.equal:3} of {a.tokens} tokens{differs}; worst {a.worst:.2e}, mean {a.mean:.2e} nats")
    line = summary(found)
    print(
        f"{args.dtype}: {line['equal']} of {line['tokens']} tokens before a first difference; "
        f"worst {line['worst_nats']:.2e}, mean {line['mean_nats']:.2e} nats "
        f"(the reference against itself: {line['reference_worst_nats']:.2e})"
    )
    if args.output:
        result = {"kind": "parity", "dtype": args.dtype, "summary": line, "prompts": [asdict(a) for a in found]}
        args.output.write_text(json.dumps(result | {"provenance": provenance()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
