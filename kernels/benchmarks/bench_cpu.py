"""The native CPU operator alone, beside the base model's matmul and the grouped torch path.

    python kernels/benchmarks/bench_cpu.py [--out FILE] [--threads N] [--rounds N]

It runs the linear layers of SmolLM2-135M (30 layers of qkv, o, gate_up, down; 232 MB in bfloat16) one after the
other as a decoding step does, so that every weight comes from memory, not from a cache left warm by the call before.
In each layer the base matmul, the packed operator and the grouped path run in turn and are timed apart. Reported per
call: the median over rounds of the mean over layers.

"bandwidth" is what a call has to move (the weights of the batch's adapters, x once, y read and written) over its
time; "share" is that over the machine's copy bandwidth (bytes read plus bytes written), measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import provenance  # isort: skip  # puts hydra_kernels on the path
import hydra_kernels as hk
import torch
from hydra_kernels import testing
from hydra_kernels.ops import build
from hydra_kernels.slots import StackedSlots

SHAPES = {"qkv": (576, (576, 192, 192)), "o": (576, (576,)), "gate_up": (576, (1536, 1536)), "down": (1536, (576,))}
LAYERS = 30
ADAPTERS = 8
LAYOUT = hk.Layout(8, 4, has_router=True)
DTYPE = torch.bfloat16
BATCHES = [(1, 1), (8, 1), (8, 8), (32, 1), (32, 8), (512, 1), (512, 8)]  # tokens, adapters
RESULTS = Path(__file__).parent / "results"


@dataclass
class Layer:
    """One linear layer: the base weight, and the same adapters in both kinds of slots."""

    shape: str
    base: torch.Tensor
    packed: hk.LayerSlots
    grouped: hk.LayerSlots


@dataclass
class Result:
    """Times of one call in microseconds."""

    shape: str
    tokens: int
    adapters: int
    packed_us: float
    grouped_us: float
    base_us: float
    packed_over_base: float
    bandwidth_gb_s: float
    share_of_copy_bandwidth: float


def make_layers() -> list[Layer]:
    """The model's layers in order, all adapters loaded."""
    capacity = testing.capacity_for([LAYOUT])
    layers = []
    for _ in range(LAYERS):
        for shape, (n_in, out) in SHAPES.items():
            packed = hk.make_slots(ADAPTERS, n_in, out, capacity, DTYPE, "cpu")
            grouped = StackedSlots(ADAPTERS, n_in, out, capacity, DTYPE, "cpu")
            for slot in range(ADAPTERS):
                weights = [testing.random_weights(n_in, o, LAYOUT, DTYPE, slot) for o in out]
                packed.load(slot, weights)
                grouped.load(slot, weights)
            layers.append(Layer(shape, torch.randn(sum(out), n_in).to(DTYPE), packed, grouped))
    return layers


def seconds(call: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by the best of several copies of 256 MiB."""
    source = torch.ones(256 << 20, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return 2 * source.numel() / min(seconds(target.copy_, source) for _ in range(9))


def bytes_moved(shape: str, tokens: int, adapters: int) -> int:
    n_in, out = SHAPES[shape]
    weights = sum(LAYOUT.z_rows * n_in + o * LAYOUT.k for o in out)
    return DTYPE.itemsize * (adapters * weights + tokens * (n_in + 2 * sum(out)))


def bench_batch(layers: Sequence[Layer], tokens: int, adapters: int, rounds: int, bandwidth: float) -> list[Result]:
    """All shapes at one batch."""
    meta = hk.StepMetadata(tokens, ADAPTERS)
    meta.update([i % adapters for i in range(tokens)])
    x = {shape: torch.randn(tokens, n_in).to(DTYPE) for shape, (n_in, _) in SHAPES.items()}
    y = {shape: torch.zeros(tokens, sum(out), dtype=DTYPE) for shape, (_, out) in SHAPES.items()}
    times: dict[tuple[str, str], list[float]] = {}
    for warm in [True] + [False] * rounds:
        sums = {(shape, kind): 0.0 for shape in SHAPES for kind in ("base", "packed", "grouped")}
        for layer in layers:
            a, b = x[layer.shape], y[layer.shape]
            sums[layer.shape, "base"] += seconds(torch.nn.functional.linear, a, layer.base)
            sums[layer.shape, "packed"] += seconds(layer.packed.linear_, b, a, meta)
            sums[layer.shape, "grouped"] += seconds(layer.grouped.linear_, b, a, meta)
        if not warm:
            for key, total in sums.items():
                times.setdefault(key, []).append(total / LAYERS)
    results = []
    for shape in SHAPES:
        base, packed, grouped = (statistics.median(times[shape, kind]) for kind in ("base", "packed", "grouped"))
        rate = bytes_moved(shape, tokens, adapters) / packed
        results.append(
            Result(
                shape,
                tokens,
                adapters,
                packed_us=round(1e6 * packed, 1),
                grouped_us=round(1e6 * grouped, 1),
                base_us=round(1e6 * base, 1),
                packed_over_base=round(packed / base, 3),
                bandwidth_gb_s=round(rate / 1e9, 2),
                share_of_copy_bandwidth=round(rate / bandwidth, 3),
            )
        )
    return results


def call_overhead(layers: Sequence[Layer]) -> dict[str, float]:
    """Microseconds of a call that has nothing to do, and of one token of one adapter with warm weights (o_proj)."""
    layer = next(layer for layer in layers if layer.shape == "o")
    meta = hk.StepMetadata(1, ADAPTERS)
    x, y = torch.randn(1, 576).to(DTYPE), torch.zeros(1, 576, dtype=DTYPE)

    def per_call() -> float:
        def calls() -> None:
            for _ in range(1000):
                layer.packed.linear_(y, x, meta)

        return round(1e6 * statistics.median(seconds(calls) for _ in range(9)) / 1000, 2)

    meta.update([-1])
    nothing = per_call()
    meta.update([0])
    return {"no_adapter_us": nothing, "one_token_warm_us": per_call()}


def environment() -> dict[str, object]:
    """Machine, commit and versions."""
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "machine": {"cpu": models[0] if models else platform.machine(), "cores": len(models)},
        "isa": build.load().isa,
        "threads": torch.get_num_threads(),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15, help="timed passes over the model; a fifth of it for prefill")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers = make_layers()
    bandwidth = copy_bandwidth()
    results = []
    with torch.inference_mode():
        overhead = call_overhead(layers)
        print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s; call: {overhead}")
        print(f"{'shape':8} tokens adapters   packed  grouped     base us  packed/base   GB/s  share")
        for tokens, adapters in BATCHES:
            rounds = options.rounds if tokens <= 64 else max(1, options.rounds // 5)
            for r in bench_batch(layers, tokens, adapters, rounds, bandwidth):
                results.append(r)
                print(
                    f"{r.shape:8} {r.tokens:6} {r.adapters:8} {r.packed_us:8.1f} {r.grouped_us:8.1f} {r.base_us:8.1f}"
                    f" {r.packed_over_base:12.3f} {r.bandwidth_gb_s:9.2f} {r.share_of_copy_bandwidth:6.2f}"
                )
    report = environment() | {
        "layout": "r=8 E=4",
        "dtype": "bfloat16",
        "copy_bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "call_overhead": overhead,
        "results": [asdict(r) for r in results],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
