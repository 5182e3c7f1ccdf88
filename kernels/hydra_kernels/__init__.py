"""Kernels for router-mixed LoRA: many HydraLoRA adapters over one batch.

    y += s * sum_i w_i * B_i A x,  w = softmax(R x)      for each token with its own slot's A, B, R, s

Use: `make_slots` for each linear layer, `LayerSlots.load` an adapter into a slot, one `StepMetadata.update` per
step, then `linear_` per layer. See kernels/README.md for the mathematics and the memory layouts.
"""

from __future__ import annotations

import torch

from hydra_kernels.dispatch import make_slots
from hydra_kernels.metadata import StepMetadata
from hydra_kernels.probe import RoutingProbe
from hydra_kernels.slots import LayerSlots, SlotCapacity
from hydra_kernels.weights import Carry, HydraWeights, Layout

__all__ = [
    "Carry",
    "HydraWeights",
    "LayerSlots",
    "Layout",
    "RoutingProbe",
    "SlotCapacity",
    "StepMetadata",
    "expand_",
    "linear_",
    "make_slots",
    "shrink",
]


def linear_(y: torch.Tensor, x: torch.Tensor, slots: LayerSlots, meta: StepMetadata) -> None:
    """Add the adapters' delta of one merged linear layer to y, in place.

        for t, slot in tokens with a slot:  for each slice that the slot adapts:
            z = [A; R] x[t]            u, g = z[:r], z[r:] + bias
            w = gate(g)                softmax, then top-k
            y[t, slice] += s * [B_0 .. B_{E-1}] (w outer u)

    y: [T, sum(out_slices)], x: [T, in], contiguous rows, of the slots' dtype (y may be a column range of a wider
    tensor). Rows without a slot are not touched; a row's result does not depend on its neighbours.
    """
    slots.linear_(y, x, meta)


def shrink(x: torch.Tensor, slots: LayerSlots, meta: StepMetadata) -> torch.Tensor:
    """z = [A; R] x of each token's slot, [slices, T, capacity.rows] float32; 0 where there is no slot.

    For row-parallel layers, whose z must be summed over ranks before the gate (softmax is not linear).
    """
    return slots.shrink(x, meta)


def expand_(y: torch.Tensor, z: torch.Tensor, slots: LayerSlots, meta: StepMetadata) -> None:
    """The gate and the product with B, in place on y, from a (reduced) z of `shrink`."""
    slots.expand_(y, z, meta)
