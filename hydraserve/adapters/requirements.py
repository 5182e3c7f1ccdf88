"""What an adapter must be to be served by one server: its base model, its slots, its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hydra_kernels import SlotCapacity

from hydraserve.adapters.limits import DEFAULT_LIMITS, AdapterLimits
from hydraserve.adapters.validate import check_base, check_range
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import BaseMismatchError, LimitError


@dataclass(frozen=True)
class Requirements:
    """
    base_shapes: module path -> (in_features, out_features) of the base model's linear layers.
    capacity:    the largest adapter that a slot takes.
    targets:     last components of the paths of the modules that the engine wraps.
    dtype:       of the adapters in the engine.
    limits:      how large an adapter's files may be.
    """

    base_shapes: Mapping[str, tuple[int, int]]
    capacity: SlotCapacity
    targets: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    limits: AdapterLimits = DEFAULT_LIMITS

    def check(self, adapter: HydraAdapter) -> None:
        """Raises BaseMismatchError, LimitError or NonFiniteError when `adapter` cannot be served."""
        check_base(adapter, self.base_shapes)
        unwrapped = sorted(set(adapter.targets) - set(self.targets))
        if unwrapped:
            raise BaseMismatchError(
                "modules",
                got=f"weights for {', '.join(unwrapped)}",
                expected=f"only modules that this server wraps: {', '.join(self.targets)}",
                fix="start the server with this adapter, or with --target-modules that include its modules",
            )
        check_capacity(adapter, self.capacity)
        check_range(adapter, self.dtype)


def check_capacity(adapter: HydraAdapter, capacity: SlotCapacity) -> None:
    """Raises LimitError when a module of the adapter does not fit a slot."""
    for name, weights in adapter.modules.items():
        try:
            capacity.check(weights)
        except ValueError as error:
            layout = weights.layout
            raise LimitError(
                f"module {name}",
                got=f"rank {layout.rank}, {layout.heads} heads" + ("" if layout.shared_a else ", an A for each head"),
                expected=str(error),
                fix=f"start the server with {_flags_for(adapter)}",
            ) from error


def _flags_for(adapter: HydraAdapter) -> str:
    """The least that makes room for every module of this adapter (`sizing.plan_slots`)."""
    flags = f"--max-rank {adapter.rank} --max-heads {adapter.heads} (or more)"
    return flags if all(layout.shared_a for layout in adapter.layouts) else f"{flags} and --per-head-a"
