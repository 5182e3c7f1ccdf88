"""Where the adapters of one (merged) linear layer are kept, ready for the kernels.

A *slot* holds one adapter. `LayerSlots` is what the engine sees; `StackedSlots` keeps tensors of one size per
slot, as CUDA graphs need; `ops.cpu.PackedSlots` keeps each adapter at its own size in the CPU operator's layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hydra_kernels.metadata import StepMetadata
from hydra_kernels.probe import RoutingProbe
from hydra_kernels.weights import LAYOUT_FIELDS, NO_ADAPTER, HydraWeights, Layout


@dataclass(frozen=True, slots=True)
class SlotCapacity:
    """The largest adapter a slot can take.

    rows:  of [A; R] (r + E, or E*r + E with one A per head).
    k:     E*r, columns of the packed B.
    heads: E.
    """

    rows: int
    k: int
    heads: int

    def check(self, weights: HydraWeights) -> None:
        """Raises ValueError, naming the limit, when `weights` does not fit."""
        layout = weights.layout
        for name, got, limit in (
            ("rows of [A; R]", layout.z_rows, self.rows),
            ("heads * rank", layout.k, self.k),
            ("heads", layout.heads, self.heads),
        ):
            if got > limit:
                raise ValueError(f"slot: got {got} {name}, expected at most {limit}; raise the slots' capacity")


class LayerSlots(ABC):
    """The adapters of one linear layer of `in_features` inputs and `out_slices` outputs (merged: several)."""

    def __init__(
        self,
        num_slots: int,
        in_features: int,
        out_slices: Sequence[int],
        capacity: SlotCapacity,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.num_slots, self.in_features, self.out_slices = num_slots, in_features, tuple(out_slices)
        self.capacity, self.dtype, self.device = capacity, dtype, torch.device(device)
        self.layouts: list[tuple[Layout | None, ...]] = [()] * num_slots  # of each slot's last load
        self.carries = False  # whether any adapter so far had logits that go between layers
        self.probe: RoutingProbe | None = None
        self.first_router = 0

    def probe_with(self, probe: RoutingProbe, first_router: int) -> None:
        """From the next load on, record the routing weights of this layer: its slices are the probe's routers
        `first_router` and the following ones.

        Raises ValueError when the probe has no room for them.
        """
        room = (probe.sums.shape[0], probe.routers - first_router, probe.heads)
        needed = (self.num_slots, len(self.out_slices), self.capacity.heads)
        if first_router < 0 or any(has < needs for has, needs in zip(room, needed, strict=True)):
            raise ValueError(f"routing probe: got room for {room} slots, routers, heads, expected at least {needed}")
        self.probe, self.first_router = probe, first_router

    def load(self, slot: int, weights: Sequence[HydraWeights | None]) -> None:
        """Put an adapter into a slot, replacing what was there: one HydraWeights (or None) for each slice.

        Raises ValueError when shapes do not match the layer or exceed the capacity; the slot is then empty.
        """
        self.clear(slot)
        if len(weights) != len(self.out_slices):
            raise ValueError(f"slot {slot}: got {len(weights)} slices, expected {len(self.out_slices)}")
        for part, out in zip(weights, self.out_slices, strict=True):
            if part is None:
                continue
            self.capacity.check(part)
            if (part.in_features, part.out_features) != (self.in_features, out):
                raise ValueError(
                    f"slot {slot}: got weights for {part.in_features} -> {part.out_features}, "
                    f"expected {self.in_features} -> {out}"
                )
        self.layouts[slot] = tuple(None if part is None else part.layout for part in weights)
        self.carries |= any(layout is not None and layout.carry for layout in self.layouts[slot])
        self._store(slot, weights)

    def _check(self, meta: StepMetadata) -> None:
        """The ops find the parts of the metadata by the number of slots. Raises ValueError when it is another."""
        if meta.max_slots != self.num_slots:
            raise ValueError(f"step metadata: got {meta.max_slots} slots, expected {self.num_slots} as in the layer")

    def _carry(self, meta: StepMetadata) -> torch.Tensor | None:
        """The step's buffer of logits. Raises ValueError when an adapter needs one that is not there."""
        room = 0 if meta.carry is None else meta.carry.shape[1]
        if self.carries and room < self.capacity.heads:
            raise ValueError(
                f"step metadata: got a carry of {room} heads, expected {self.capacity.heads}; make it with heads=..."
            )
        return meta.carry

    @abstractmethod
    def _store(self, slot: int, weights: Sequence[HydraWeights | None]) -> None: ...

    @abstractmethod
    def clear(self, slot: int) -> None:
        """Empty a slot. Tokens that still name it get no delta."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held for all slots."""

    @abstractmethod
    def linear_(self, y: torch.Tensor, x: torch.Tensor, meta: StepMetadata) -> None:
        """See `hydra_kernels.linear_`."""

    @abstractmethod
    def shrink(self, x: torch.Tensor, meta: StepMetadata) -> torch.Tensor:
        """See `hydra_kernels.shrink`."""

    @abstractmethod
    def expand_(self, y: torch.Tensor, z: torch.Tensor, meta: StepMetadata) -> None:
        """See `hydra_kernels.expand_`."""


class StackedSlots(LayerSlots):
    """Fixed-size tensors for all slots, at addresses that never change.

    a:      [slots, slices, rows, in], [A; R] of each slice; unused rows are never read.
    b:      [slots, sum(out_slices), k], s * B packed as `HydraWeights.flat_b`; columns start at 0.
    layout: [slots, slices, 8] int32, see `LayoutField`; rank 0 where nothing is to be done.
    bias:   [slots, slices, heads] float32, the router's bias or 0.
    slice_start: [slices + 1] int32, where each slice's columns of y begin.
    """

    def __init__(
        self,
        num_slots: int,
        in_features: int,
        out_slices: Sequence[int],
        capacity: SlotCapacity,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(num_slots, in_features, out_slices, capacity, dtype, device)
        slices, out = len(self.out_slices), sum(self.out_slices)
        self.a = torch.zeros(num_slots, slices, capacity.rows, in_features, dtype=dtype, device=device)
        self.b = torch.zeros(num_slots, out, capacity.k, dtype=dtype, device=device)
        self.layout = torch.zeros(num_slots, slices, LAYOUT_FIELDS, dtype=torch.int32, device=device)
        self.bias = torch.zeros(num_slots, slices, capacity.heads, dtype=torch.float32, device=device)
        starts = [sum(self.out_slices[:i]) for i in range(slices + 1)]
        self.slice_start = torch.tensor(starts, dtype=torch.int32, device=device)
        self._starts = starts

    def _store(self, slot: int, weights: Sequence[HydraWeights | None]) -> None:
        records = []
        for i, part in enumerate(weights):
            if part is None:
                records.append(NO_ADAPTER)
                continue
            stacked, flat, layout = part.stacked_a(), part.flat_b(), part.layout
            self.a[slot, i, : layout.z_rows].copy_(stacked, non_blocking=True)
            self.b[slot, self._starts[i] : self._starts[i + 1], : layout.k].copy_(flat, non_blocking=True)
            if part.bias is not None:
                self.bias[slot, i, : layout.heads].copy_(part.bias, non_blocking=True)
            records.append(layout.record())
        self.layout[slot].copy_(torch.tensor(records, dtype=torch.int32), non_blocking=True)

    def clear(self, slot: int) -> None:
        self.layout[slot].zero_()

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.a, self.b, self.layout, self.bias))

    def linear_(self, y: torch.Tensor, x: torch.Tensor, meta: StepMetadata) -> None:
        self._check(meta)
        step = *meta_args(meta), *self._probe_args(), self._carry(meta)
        torch.ops.hydra_kernels.linear_(y, x, self.a, *self._expand_args(), *step)

    def shrink(self, x: torch.Tensor, meta: StepMetadata) -> torch.Tensor:
        self._check(meta)
        z: torch.Tensor = torch.ops.hydra_kernels.shrink(x, self.a, self.layout, *meta_args(meta))
        return z

    def expand_(self, y: torch.Tensor, z: torch.Tensor, meta: StepMetadata) -> None:
        self._check(meta)
        step = *meta_args(meta), *self._probe_args(), self._carry(meta)
        torch.ops.hydra_kernels.expand_(y, z, *self._expand_args(), *step)

    def _expand_args(self) -> tuple[torch.Tensor | tuple[int, ...], ...]:
        return self.b, self.layout, self.bias, self.slice_start, self.out_slices

    def _probe_args(self) -> tuple[torch.Tensor | None, int]:
        return None if self.probe is None else self.probe.control, self.first_router


def meta_args(meta: StepMetadata) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """What the custom ops take of the step's metadata."""
    return meta.host, meta.device, meta.max_tokens, meta.max_slots
