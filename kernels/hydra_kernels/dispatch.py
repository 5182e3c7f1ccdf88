"""Device -> implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hydra_kernels.ops import library  # noqa: F401  registers the custom ops
from hydra_kernels.slots import LayerSlots, SlotCapacity, StackedSlots


def make_slots(
    num_slots: int,
    in_features: int,
    out_slices: Sequence[int],
    capacity: SlotCapacity,
    dtype: torch.dtype,
    device: torch.device | str,
) -> LayerSlots:
    """Slots of the fastest kind for `device`.

    On a CPU these are packed slots, whose native operator is built on the first call (see `ops.build`).
    """
    if torch.device(device).type == "cpu":
        from hydra_kernels.ops import cpu  # here, so that `python -m hydra_kernels.ops.build` imports build.py once

        if cpu.available(dtype):
            return cpu.PackedSlots(num_slots, in_features, out_slices, capacity, dtype, device)
    return StackedSlots(num_slots, in_features, out_slices, capacity, dtype, device)
