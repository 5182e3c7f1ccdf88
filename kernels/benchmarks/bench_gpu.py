"""The Triton kernels on a GPU: against vLLM's LoRA kernels, the authors' layer, and the copy bandwidth.

    python kernels/benchmarks/bench_gpu.py [--out FILE] [--models ...] [--vllm-files FOLDER] [--dry-run]

For the layers of Llama-2-7B, Llama-3-8B and Llama-3-70B, 1 to 8192 tokens, 1, 8 and 64 adapters in the batch, r=8 E=4
and r=16 E=8: the time of shrink + expand over vLLM's lora_shrink + lora_expand at rank E*r, that is, with as many
parameters in B. vLLM's files are those of the vLLM installed beside, or in the folder given (the one that holds
lora_shrink_op.py). Without them the peer is its algorithm as our kernels compute it, one head of rank E*r, and marked
so. Also: bytes that have to be moved (weights of the batch's adapters, x once, y read and written) over the time, as
a share of the copy bandwidth measured in the same run; and the time of the authors' layer, head by head in eager
PyTorch: with few tokens of many adapters that is the time of its launches.

All are called in turn, each after a write that evicts the L2; reported are medians. Results are compared first: ours
with the authors' layer, the peer with the reference. --dry-run goes through all of it on the CPU, with tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import provenance
import torch
from hydra_kernels import reference, testing
from hydra_kernels.metadata import StepMetadata
from hydra_kernels.slots import StackedSlots
from hydra_kernels.tuning.shapes import ADAPTERS, MODELS, LayerShape, capacity
from hydra_kernels.tuning.timing import Timer
from hydra_kernels.weights import HydraWeights, Layout
from peers import AuthorsLayer, VllmPair, find_vllm, load_vllm

TOKENS = (1, 8, 64, 256, 2048, 8192)
BATCH_ADAPTERS = (1, 8, 64)
DIFFERENT = 4
LARGE = 2048  # tokens from which on the share of the copy bandwidth is the yardstick
TINY = {"tiny": (LayerShape("qkv", 48, (32, 16, 16)), LayerShape("down", 96, (48,)))}
RESULTS = Path(__file__).parent / "results"


@dataclass
class Cell:
    """One measured case; times in microseconds."""

    model: str
    layer: str
    adapter: str
    tokens: int
    adapters: int
    ours_us: float
    peer_us: float
    peer: str
    over_peer: float
    authors_us: float
    authors_over_ours: float
    gb_s: float
    share_of_copy: float
    error: float


class LayerCase:
    """A layer with one adapter layout in every slot, its peers, and room for the largest batch."""

    def __init__(
        self, shape: LayerShape, layout: Layout, slots: int, tokens: int, device: str, vllm: SimpleNamespace | None
    ) -> None:
        self.shape, self.layout, self.device, self.vllm = shape, layout, device, vllm
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.adapters = self._adapters(layout, slots)
        self.ours = self._slots(layout, self.adapters)
        plain = Layout(layout.k)
        self.plain_adapters = self._adapters(plain, slots)
        self.plain = self._slots(plain, self.plain_adapters)
        self.meta = StepMetadata(tokens, slots, device)
        self.authors = AuthorsLayer(shape, self.adapters)
        self.vllm_pair = None if vllm is None else VllmPair(vllm, self.plain, layout.k)
        self.x = torch.randn(tokens, shape.in_features, device=device).to(self.dtype)
        self.y = torch.randn(tokens, shape.out, device=device).to(self.dtype)

    def _weights(self, layout: Layout, seed: int) -> list[HydraWeights]:
        n_in, outs = self.shape.in_features, self.shape.out_slices
        parts = (testing.random_weights(n_in, out, layout, self.dtype, seed + i) for i, out in enumerate(outs))
        return [part.to(device=self.device) for part in parts]

    def _adapters(self, layout: Layout, slots: int) -> list[list[HydraWeights]]:
        """Of a few different ones, in turn: each slot has its own memory, and random numbers take long to make."""
        different = [self._weights(layout, seed) for seed in range(min(slots, DIFFERENT))]
        return [different[slot % DIFFERENT] for slot in range(slots)]

    def _slots(self, layout: Layout, adapters: Sequence[Sequence[HydraWeights]]) -> StackedSlots:
        shape, size = self.shape, capacity(layout)
        slots = StackedSlots(len(adapters), shape.in_features, shape.out_slices, size, self.dtype, self.device)
        for i, weights in enumerate(adapters):
            slots.load(i, weights)
        return slots

    def moved_bytes(self, tokens: int, adapters: int) -> int:
        """What a call has to read and write."""
        weights = adapters * sum(part.nbytes for part in self.adapters[0])
        return weights + self.dtype.itemsize * tokens * (self.shape.in_features + 2 * self.shape.out)

    def calls(self, tokens: int, adapters: int) -> dict[str, Callable[[], None]]:
        """The step set to this batch, and what is measured."""
        ids = testing.token_slots("distinct" if tokens <= adapters else "uniform", tokens, adapters)
        x, y = self.x[:tokens], self.y[:tokens]
        self.meta.update(ids)
        self.authors.prepare(ids.tolist())
        calls: dict[str, Callable[[], None]] = {
            "ours": lambda: self.ours.linear_(y, x, self.meta),
            "authors": lambda: self.authors.add_(y, x),
        }
        if self.vllm_pair is None:
            return calls | {"peer": lambda: self.plain.linear_(y, x, self.meta)}
        pair = self.vllm_pair
        pair.prepare(ids.tolist())
        return calls | {"peer": lambda: pair.add_(y, x)}

    def check(self, tokens: int, calls: dict[str, Callable[[], None]]) -> float:
        """Error of ours against the authors' layer on the same batch; raises when they, or peer and reference, differ.

        y is made anew: every timed call adds to it, and an error would be small beside what has gathered there.
        """
        x, y = self.x[:tokens], self.y[:tokens].normal_()
        start, results = y.clone(), {}
        for name, call in calls.items():
            call()
            results[name] = y.clone()
            y.copy_(start)
        slots = self.meta.part("token_slot")[:tokens].tolist()
        expected = reference.linear(start, x, slots, self.plain_adapters, self.shape.out_slices)
        self._agree(tokens, "peer", testing.max_error(results["peer"], expected), testing.TOLERANCE[self.dtype])
        # The authors' layer rounds y and the weights once for each head, ours once for all of them.
        error = testing.max_error(results["ours"], results["authors"])
        self._agree(tokens, "ours", error, self.layout.heads * testing.TOLERANCE[self.dtype])
        return error

    def _agree(self, tokens: int, name: str, error: float, limit: float) -> None:
        if not error < limit:
            raise RuntimeError(
                f"{self.shape} {self.layout} T={tokens}, {name}: got error {error}, expected under {limit}"
            )


def measure(
    timer: Timer, bandwidth: float, case: LayerCase, name: tuple[str, str], tokens: int, adapters: int, rounds: int
) -> Cell:
    """One cell. name: of the model and of the adapter."""
    calls = case.calls(tokens, adapters)
    error = case.check(tokens, calls)
    times = timer.medians(calls, rounds)
    ours, peer, authors = times["ours"], times["peer"], times["authors"]
    rate = case.moved_bytes(tokens, adapters) / (ours * 1e-6)
    return Cell(
        model=name[0],
        layer=case.shape.name,
        adapter=name[1],
        tokens=tokens,
        adapters=adapters,
        ours_us=round(ours, 2),
        peer_us=round(peer, 2),
        peer="vllm" if case.vllm_pair is not None else "one head of ours",
        over_peer=round(ours / peer, 3),
        authors_us=round(authors, 2),
        authors_over_ours=round(authors / ours, 2),
        gb_s=round(rate / 1e9, 1),
        share_of_copy=float(f"{rate / bandwidth:.3g}"),
        error=round(error, 5),
    )


def batches(tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(tokens, adapters): no more adapters than tokens."""
    return ((n, adapters) for n in tokens for adapters in BATCH_ADAPTERS if adapters <= n)


def mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def print_table(cells: Sequence[Cell], bandwidth: float) -> None:
    """Over all layers of all models: geometric means, and the worst ratio; then the cells that miss a target."""
    print(
        f"\ncopy bandwidth {bandwidth / 1e9:.0f} GB/s; peer: {', '.join(sorted({c.peer for c in cells}))} at rank E*r"
    )
    print("adapter  tokens adapters   ours us  over peer (worst)  share of copy (least)  authors over ours (eager)")
    for key in sorted({(c.adapter, c.tokens, c.adapters) for c in cells}, key=lambda k: (k[0], k[1:])):
        same = [c for c in cells if (c.adapter, c.tokens, c.adapters) == key]
        ours, factor = mean([c.ours_us for c in same]), mean([c.authors_over_ours for c in same])
        ratio, share = [c.over_peer for c in same], [c.share_of_copy for c in same]
        print(
            f"{key[0]:8} {key[1]:6} {key[2]:8} {ours:9.1f} {mean(ratio):10.2f} ({max(ratio):.2f})"
            f" {mean(share):15.2f} ({min(share):.2f}) {factor:26.1f}"
        )
    slower = [c for c in cells if c.over_peer > 1.0]
    slow = [c for c in cells if c.tokens >= LARGE and c.share_of_copy < 0.7]
    print(f"{len(slower)} of {len(cells)} cells slower than the peer:", *map(_brief, slower), sep="\n  ")
    print(
        f"{len(slow)} cells of {LARGE} tokens and more under 0.7 of the copy bandwidth:", *map(_brief, slow), sep="\n  "
    )


def _brief(cell: Cell) -> str:
    case = f"{cell.model} {cell.layer} {cell.adapter} T={cell.tokens} adapters={cell.adapters}"
    return f"{case}: {cell.over_peer:.2f} of the peer, {cell.share_of_copy:.2f} of copy"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: results/gpu_<name>.json beside this file")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--vllm-files", type=Path, help="a folder with vLLM's lora/ops/triton_ops")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny, nothing written without --out")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("got no GPU, expected one that torch sees; --dry-run needs none")
    return options


def write(path: Path, header: dict[str, object], cells: Sequence[Cell]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = ",\n  ".join(json.dumps(asdict(cell)) for cell in cells)
    path.write_text(f'{json.dumps(header)[:-1]},\n "cells": [\n  {lines}\n ]}}\n')


def main(arguments: Sequence[str] | None = None) -> list[Cell]:
    options = parse_arguments(arguments)
    device = "cpu" if options.dry_run else "cuda"
    models = TINY if options.dry_run else {name: MODELS[name] for name in options.models}
    tokens = [n for n in options.tokens if n <= 64] if options.dry_run else options.tokens
    files = options.vllm_files or find_vllm()
    vllm = None if options.dry_run or files is None else load_vllm(files)
    timer = Timer(device)
    bandwidth = timer.copy_bandwidth(1 << 20) if options.dry_run else timer.copy_bandwidth()
    gpu = "none (dry run)" if options.dry_run else torch.cuda.get_device_name()
    header = {"gpu": gpu, "commit": provenance.commit()}
    header |= {"versions": provenance.versions() | {"cuda": str(torch.version.cuda)}}
    header |= {"copy_gb_s": round(bandwidth / 1e9, 1), "rounds": options.rounds}
    out = options.out
    if out is None and not options.dry_run:
        out = RESULTS / f"gpu_{gpu.lower().replace(' ', '_')}.json"
    cells: list[Cell] = []
    for model, layers in models.items():
        for adapter, layout in ADAPTERS.items():
            for shape in layers:
                case = LayerCase(shape, layout, min(max(tokens), BATCH_ADAPTERS[-1]), max(tokens), device, vllm)
                for n, adapters in batches(tokens):
                    cells.append(measure(timer, bandwidth, case, (model, adapter), n, adapters, options.rounds))
                if out is not None:  # after each layer: what was measured before an interruption is worth keeping
                    write(out, header, cells)
                print(f"{model} {adapter} {shape.name} done", flush=True)
    print_table(cells, bandwidth)
    if out is not None:
        print(f"wrote {out}")
    return cells


if __name__ == "__main__":
    main()
