"""Measures block sizes on this machine's GPU and writes the table that the kernels then use.

    python -m hydra_kernels.tuning.tune [--models llama-3-8b ...] [--tokens 16 64 ...] [--out FILE]

For each layer, adapter and number of tokens, one block size after the other is varied and the fastest kept. Without
--out the table is written where it is looked for: the folder in HYDRA_KERNELS_TUNING, else this package. What an
existing table says of other layers is kept.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hydra_kernels import testing
from hydra_kernels.metadata import StepMetadata
from hydra_kernels.slots import StackedSlots, meta_args
from hydra_kernels.tuning import table
from hydra_kernels.tuning.config import ExpandConfig, ShrinkConfig, default_expand, default_shrink
from hydra_kernels.tuning.shapes import ADAPTERS, MODELS, LayerShape, capacity
from hydra_kernels.tuning.timing import Timer
from hydra_kernels.weights import Layout

TOKENS = (1, 16, 64, 256, 1024, 2048, 8192)
ADAPTERS_IN_BATCH = 8
ROUNDS = 15

Pair = tuple[ShrinkConfig, ExpandConfig]
Measure = Callable[[Sequence[Pair]], Sequence[float]]  # microseconds of each pair; infinite where it cannot run

SHRINK_CHOICES: Mapping[str, Sequence[Any]] = {
    "chunks": (1, 4, 16),
    "tile": (16, 64),
    "block_in": (64, 128, 256),
    "block_rows": (16, 32),
    "warps": (2, 4, 8),
    "stages": (2, 3, 4),
}
EXPAND_CHOICES: Mapping[str, Sequence[Any]] = {
    "tile, tokens": ((16, 16), (64, 32), (64, 64)),
    "block_out": (64, 128, 256),
    "out_steps": (1, 2, 4, 8),
    "warps": (4, 8),
    "stages": (2, 3),
    "registers": (0, 128),
    "pdl": (False, True),
}


def variants(config: Any, fields: str, values: Sequence[Any]) -> Iterator[Any]:
    """`config` with other values of its field, or of several fields (comma-separated) at once."""
    names = fields.split(", ")
    for value in values:
        yield replace(config, **dict(zip(names, value if len(names) > 1 else (value,), strict=True)))


def search(start: Pair, vary: Mapping[str, bool], measure: Measure, *, pdl: bool) -> tuple[Pair, float]:
    """The fastest pair found by varying one block size at a time, and its microseconds.

    vary: which of "shrink" and "expand" to vary. pdl: whether the GPU has programmatic dependent launch.
    """
    best, best_time = start, float("inf")
    for fields, values in SHRINK_CHOICES.items() if vary["shrink"] else ():
        shrinks = [(changed, best[1]) for changed in variants(best[0], fields, values)]
        best_time, best = min(zip(measure(shrinks), shrinks, strict=True), key=lambda timed: timed[0])
    for fields, values in EXPAND_CHOICES.items() if vary["expand"] else ():
        if fields != "pdl" or pdl:
            expands = [(best[0], changed) for changed in variants(best[1], fields, values)]
            best_time, best = min(zip(measure(expands), expands, strict=True), key=lambda timed: timed[0])
    return best, best_time


class LayerBench:
    """A layer with adapters on the GPU, for one number of tokens."""

    def __init__(self, shape: LayerShape, layout: Layout, tokens: int, timer: Timer) -> None:
        device, dtype = torch.device("cuda"), torch.bfloat16
        adapters = min(tokens, ADAPTERS_IN_BATCH)
        self.slots = StackedSlots(adapters, shape.in_features, shape.out_slices, capacity(layout), dtype, device)
        weights = [testing.random_weights(shape.in_features, out, layout, dtype) for out in shape.out_slices]
        for slot in range(adapters):
            self.slots.load(slot, weights)
        self.meta = StepMetadata(tokens, adapters, device)
        self.meta.update(testing.token_slots("uniform", tokens, adapters))
        self.x = torch.randn(tokens, shape.in_features, dtype=dtype, device=device)
        self.y = torch.randn(tokens, shape.out, dtype=dtype, device=device)
        self.timer = timer

    def call(self, pair: Pair) -> None:
        from hydra_kernels.ops.expand import expand_
        from hydra_kernels.ops.shrink import shrink_partials

        s, step = self.slots, meta_args(self.meta)
        z = shrink_partials(self.x, s.a, s.layout, *step, pair[0], pair[1].pdl)
        expand_(self.y, z, s.b, s.layout, s.bias, s.slice_start, s.out_slices, *step, pair[1])

    def measure(self, pairs: Sequence[Pair]) -> list[float]:
        """See `Measure`."""
        from triton.runtime.errors import OutOfResources, PTXASError  # type: ignore[import-untyped]

        calls: dict[str, Callable[[], None]] = {}
        for i, pair in enumerate(pairs):
            try:
                self.call(pair)
            except (OutOfResources, PTXASError):  # more shared memory, or fewer registers, than the kernel needs
                continue
            calls[str(i)] = lambda pair=pair: self.call(pair)  # type: ignore[misc]
        times = self.timer.medians(calls, ROUNDS)
        return [times.get(str(i), float("inf")) for i in range(len(pairs))]


def tune(models: Sequence[str], tokens: Sequence[int], known: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """Adds entries to `known`, by (op, shape, tokens), for everything that it does not have yet."""
    timer = Timer("cuda")
    for shape in dict.fromkeys(layer for model in models for layer in MODELS[model]):
        for layout in ADAPTERS.values():
            for n in tokens:
                tune_layer(shape, layout, n, timer, known)


def tune_layer(
    shape: LayerShape, layout: Layout, tokens: int, timer: Timer, known: dict[tuple[Any, ...], dict[str, Any]]
) -> None:
    """`tune` for one layer, adapter and number of tokens."""
    slices = len(shape.out_slices)
    shrink_key = "shrink", (shape.in_features, layout.z_rows, slices), tokens
    expand_key = "expand", (shape.out, layout.k, slices), tokens
    vary = {"shrink": shrink_key not in known, "expand": expand_key not in known}
    if not any(vary.values()):
        return
    shrink = default_shrink(tokens, shape.in_features, layout.z_rows, slices, 2)
    start = shrink, default_expand(tokens, shape.out, layout.k, 2, shrink.splits(shape.in_features))
    if not vary["shrink"]:
        start = ShrinkConfig(**known[shrink_key]["config"]), start[1]
    if not vary["expand"]:
        start = start[0], ExpandConfig(**known[expand_key]["config"])
    bench = LayerBench(shape, layout, tokens, timer)
    before = bench.measure([start])[0]
    best, time = search(start, vary, bench.measure, pdl=torch.cuda.get_device_capability()[0] >= 9)
    print(
        f"{shape.name} {shape.in_features} -> {shape.out} {layout} T={tokens}: {before:.1f} -> {time:.1f} us",
        flush=True,
    )
    if vary["shrink"]:
        known[shrink_key] = table.entry(*shrink_key, best[0], pair_us=round(time, 2))
    if vary["expand"]:
        known[expand_key] = table.entry(*expand_key, best[1], pair_us=round(time, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("got no GPU, expected one that torch sees; block sizes are measured, not computed")
    gpu = torch.cuda.get_device_name()
    folder = Path(os.environ.get(table.FOLDER_VARIABLE, Path(table.__file__).parent))
    path = options.out or folder / table.file_name(gpu)
    known = table.entries_by_key(path.read_text(), str(path)) if path.is_file() else {}
    try:
        tune(options.models, options.tokens, known)
    finally:  # what was measured before an interruption is worth keeping
        header = {"gpu": gpu, "torch": torch.__version__, "cuda": str(torch.version.cuda)}
        path.write_text(table.dump(header, list(known.values())))
        print(f"wrote {len(known)} entries to {path}")


if __name__ == "__main__":
    main()
