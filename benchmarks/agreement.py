"""`vllm bench serve` and `hydraserve bench` against one server, in turn: do two clients see the same numbers?

    python benchmarks/agreement.py [--output benchmarks/results/agreement.json]

vLLM's benchmark is run as it comes, with --lora-modules. Exit status 1 when the two clients' ranges over the repeats do
not overlap.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydraserve.adapters.synthetic import make_adapter, save_adapter
from hydraserve.bench.client import drive
from hydraserve.bench.machine import provenance
from hydraserve.bench.process import ServerProcess
from hydraserve.bench.stats import Metrics, Spread, over_repeats, run_metrics
from hydraserve.bench.workload import Lengths, Load, Workload
from hydraserve.models import base_shapes, demo_model

ADAPTERS = ["a0", "a1", "a2", "a3"]
# Our name -> vLLM's in its result file. Its "median" is a p50, its itl is by chunk.
METRICS = {
    "output_tokens_per_s": "output_throughput",
    "ttft_ms.p50": "median_ttft_ms",
    "tpot_ms.p50": "median_tpot_ms",
    "itl_ms.p50": "median_itl_ms",
    "output_tokens": "total_output_tokens",
}
# vLLM's `vllm` command asks for the version of a package "vllm", which the CPU build is not; this is what it runs.
VLLM_BENCH = """\
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def vllm_bench(url: str, model: Path, args: argparse.Namespace, seed: int, folder: Path) -> Metrics:
    """One run of `vllm bench serve`."""
    command = [
        *(sys.executable, "-c", VLLM_BENCH, "--backend", "openai", "--base-url", url),
        *("--model", str(model), "--served-model-name", "base", "--lora-modules", *ADAPTERS),
        *("--dataset-name", "random", "--random-input-len", str(args.input_len)),
        *("--random-output-len", str(args.output_len), "--ignore-eos", "--seed", str(seed)),
        *("--num-prompts", str(args.batch * args.waves), "--max-concurrency", str(args.batch), "--disable-tqdm"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "vllm.json"),
        *("--percentile-metrics", "ttft,tpot,itl", "--temperature", "0"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vllm bench serve failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads((folder / "vllm.json").read_text())
    return {name: float(found[theirs]) for name, theirs in METRICS.items()}


def our_bench(url: str, vocabulary: int, args: argparse.Namespace, seed: int) -> Metrics:
    """One run of ours."""
    load = Load(concurrency=args.batch)
    workload = Workload(vocabulary, Lengths(*[args.input_len] * 2), Lengths(*[args.output_len] * 2), "uniform")
    metrics = run_metrics(drive(url, workload.requests(args.batch * args.waves, ADAPTERS, load, seed), load))
    return {name: metrics[name] for name in METRICS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--waves", type=int, default=4)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = demo_model()
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    theirs: list[Metrics] = []
    ours: list[Metrics] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = ["--model", str(model), "--served-model-name", "base", "--no-enable-prefix-caching"]
        arguments += ["--max-model-len", "512", "--max-num-seqs", str(args.batch), "--kv-cache-memory-bytes", "1G"]
        shapes = {path: shape for path, shape in base_shapes(str(model)).items() if path != "lm_head"}
        for seed, adapter in enumerate(ADAPTERS):
            save_adapter(make_adapter(shapes, seed=seed), folder / adapter)
            arguments += ["--adapter", f"{adapter}={folder / adapter}"]
        with ServerProcess(arguments, folder / "log") as server:
            our_bench(server.url, vocabulary, args, args.repeats)
            for seed in range(args.repeats):
                theirs.append(vllm_bench(server.url, model, args, seed, folder))
                ours.append(our_bench(server.url, vocabulary, args, seed))
                print(json.dumps({"vllm": theirs[-1], "ours": ours[-1]}), file=sys.stderr)
    return report(theirs, ours, args)


def overlap(a: Spread, b: Spread) -> bool:
    """Whether some value lies in both ranges."""
    return max(a["min"], b["min"]) <= min(a["max"], b["max"])


def report(theirs: list[Metrics], ours: list[Metrics], args: argparse.Namespace) -> int:
    """Print and write the comparison; 1 when the clients disagree."""
    spreads = {"vllm bench serve": over_repeats(theirs), "hydraserve bench": over_repeats(ours)}
    disagree = []
    for name in METRICS:
        a, b = (spreads[client][name] for client in spreads)
        shown = [f"{s['median']:8.2f} [{s['min']:.2f}..{s['max']:.2f}]" for s in (a, b)]
        print(f"{name:20} vLLM {shown[0]}   ours {shown[1]}")
        if not overlap(a, b):
            disagree.append(name)
    if args.output is not None:
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        result = {"kind": "agreement", "provenance": provenance(), "settings": settings, "over_repeats": spreads}
        result |= {"runs": {"vllm bench serve": theirs, "hydraserve bench": ours}, "disagree": disagree}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if disagree:
        print(f"the clients disagree on {', '.join(disagree)}")
    return 1 if disagree else 0


if __name__ == "__main__":
    sys.exit(main())
