"""The layers and adapters that block sizes are tuned for, benchmarks measure, and compilation is checked with."""

from __future__ import annotations

from dataclasses import dataclass

from hydra_kernels.slots import SlotCapacity
from hydra_kernels.weights import Layout


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A merged linear layer of `in_features` inputs and one output size for each of its slices."""

    name: str
    in_features: int
    out_slices: tuple[int, ...]

    @property
    def out(self) -> int:
        return sum(self.out_slices)


def llama(hidden: int, kv: int, intermediate: int) -> tuple[LayerShape, ...]:
    """The four merged layers of a Llama block, as a server holds them."""
    return (
        LayerShape("qkv", hidden, (hidden, kv, kv)),
        LayerShape("o", hidden, (hidden,)),
        LayerShape("gate_up", hidden, (intermediate, intermediate)),
        LayerShape("down", intermediate, (hidden,)),
    )


MODELS = {
    "llama-2-7b": llama(4096, 4096, 11008),
    "llama-3-8b": llama(4096, 1024, 14336),
    "llama-3-70b": llama(8192, 1024, 28672),
}

# The paper's sizes and twice those.
ADAPTERS = {"r8-e4": Layout(8, 4, has_router=True), "r16-e8": Layout(16, 8, has_router=True)}


def capacity(layout: Layout) -> SlotCapacity:
    """Slots made for this layout."""
    return SlotCapacity(rows=layout.z_rows, k=layout.k, heads=layout.heads)
