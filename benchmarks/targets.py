"""What was promised, and whether the result files keep it. Printed and put into docs/benchmarks.md by run.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydraserve.bench.result import load
from hydraserve.bench.stats import Spread, paired_ratio

TOKENS, TPOT, TTFT = "output_tokens_per_s", "tpot_ms.p50", "ttft_ms.p50"


@dataclass(frozen=True)
class Target:
    """`arm` over `base` at `batch`, of `metric` in the result `file`: at most, or at least, `limit`."""

    text: str
    file: str
    arm: str
    base: str
    batch: int
    metric: str
    limit: float
    at_least: bool = False

    def met_by(self, ratio: float) -> bool:
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    def verdict(self, ratio: Spread) -> str:
        """Of the median; a range with the limit inside does not tell it from the limit, which is said."""
        crosses = self.met_by(ratio["min"]) != self.met_by(ratio["max"])
        return ("met" if self.met_by(ratio["median"]) else "**missed**") + ", range crosses the limit" * crosses


ONE, EIGHT = "hydra-r8-e4-1", "hydra-r8-e4-8"

TARGETS = (
    *(Target("TPOT, one adapter / LoRA off", "adapter-cost", ONE, "off", n, TPOT, 1.10) for n in (1, 8, 32)),
    *(Target("TPOT, 8 adapters / LoRA off", "adapter-cost", EIGHT, "off", n, TPOT, 1.20) for n in (8, 32)),
    *(Target("TPOT, base only / LoRA off", "adapter-cost", "base-only", "off", n, TPOT, 1.03) for n in (1, 8, 32)),
    Target("tok/s, one adapter / vLLM's LoRA r32", "plain-lora", ONE, "lora-r32-1", 8, TOKENS, 5.0, at_least=True),
    Target("TTFT of 512 tokens, one adapter / LoRA off", "prefill", ONE, "off", 1, TTFT, 1.15),
    Target("tok/s, 16 adapters / 1 adapter", "sixteen", "hydra-r8-e4-16", ONE, 32, TOKENS, 0.90, at_least=True),
    Target("tok/s, 1 adapter / transformers", "reference", ONE, "reference-1", 8, TOKENS, 3.0, at_least=True),
    Target("tok/s, 8 adapters / transformers", "reference", EIGHT, "reference-8", 8, TOKENS, 12.0, at_least=True),
)


def ratio_of(target: Target, result: Mapping[str, Any]) -> Spread | None:
    """Repeat by repeat; None when the result lacks one of the cells."""
    cells = {cell["arm"]: cell for cell in result["cells"] if cell["load"]["concurrency"] == target.batch}
    if target.arm not in cells or target.base not in cells:
        return None
    arm, base = ([run["metrics"] for run in cells[name]["runs"]] for name in (target.arm, target.base))
    return paired_ratio(arm, base, target.metric)


def table(folder: Path, suffix: str = "", targets: Sequence[Target] = TARGETS) -> str:
    """All targets as Markdown. suffix: of the result files' names, such as "-avx2"."""
    lines = ["| target | batch | limit | measured [smallest..largest] | |", "| --- | ---: | ---: | ---: | --- |"]
    for target in targets:
        file = folder / f"{target.file}{suffix}.json"
        ratio = ratio_of(target, load(file)) if file.exists() else None
        limit = f"{'at least' if target.at_least else 'at most'} {target.limit:.2f}"
        if ratio is None:
            measured, verdict = "-", "not measured"
        else:
            measured = f"{ratio['median']:.2f} [{ratio['min']:.2f}..{ratio['max']:.2f}]"
            verdict = target.verdict(ratio)
        lines.append(f"| {target.text} | {target.batch} | {limit} | {measured} | {verdict} |")
    return "\n".join(lines) + "\n"
