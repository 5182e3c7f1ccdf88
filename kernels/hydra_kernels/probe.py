"""Seeing the gate: where kernels leave the routing weights that they have in registers anyway.

A layer that `LayerSlots.probe_with` was called for looks at the probe's control block in each step. While that says
"nothing", this is all it costs; a layer without a probe does not even look.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch


class ControlField(IntEnum):
    """First numbers of `RoutingProbe.control` (int64); the fields of `Probe` in csrc/probe.h. After them, for each
    token of the step, the address of its trace (see `RoutingProbe.set`), 0 for none."""

    SUMS = 0  # address of `RoutingProbe.sums`; 0: this step is not counted
    TRACED = 1  # 1 when any token of this step has a trace
    ROUTERS = 2
    HEADS = 3


class RoutingProbe:
    """What is recorded of all routers of a model: one for each adapted layer and slice, numbered from 0.

    control: [4 + max_tokens] int64, see `ControlField`; it keeps its address for the life of the object.
    sums:    [slots, routers, heads + 1] float64: for each slot, the sum over tokens of each head's routing weight;
             last the sum of the weights' entropy, in nats.

    Kernels add to `sums`, which is the owner's to read and clear. Only routers count: what has one head, or several
    without a router, is not recorded.
    """

    def __init__(
        self, slots: int, routers: int, heads: int, max_tokens: int, device: torch.device | str = "cpu"
    ) -> None:
        self.routers, self.heads, self.max_tokens = routers, heads, max_tokens
        self.sums = torch.zeros(slots, routers, heads + 1, dtype=torch.float64, device=device)
        self.control_host = torch.zeros(len(ControlField) + max_tokens, dtype=torch.int64)
        self.control_host[ControlField.ROUTERS], self.control_host[ControlField.HEADS] = routers, heads
        on_cpu = torch.device(device).type == "cpu"
        self.control = self.control_host if on_cpu else self.control_host.to(device)
        self._np = self.control_host.numpy()

    @property
    def active(self) -> bool:
        """Whether kernels record anything in this step."""
        return bool(self._np[ControlField.SUMS] or self._np[ControlField.TRACED])

    def trace(self, tokens: int) -> torch.Tensor:
        """A buffer for the weights of `tokens` tokens, [tokens, routers, heads] float32; NaN until written."""
        shape = (tokens, self.routers, self.heads)
        return torch.full(shape, float("nan"), dtype=torch.float32, device=self.control.device)

    def set(self, *, count: bool, traces: np.ndarray | None = None) -> None:
        """Say what the next step records.

        count:  whether its tokens are added to `sums`.
        traces: [T] int64, for each row of the step the address of one token of a `trace` buffer, 0 for none.

        Raises ValueError when there are more rows than the object was made for.
        """
        if traces is not None and len(traces) > self.max_tokens:
            raise ValueError(f"routing probe: got {len(traces)} rows, expected at most {self.max_tokens}")
        sums = self.sums.data_ptr() if count else 0
        if traces is None and sums == self._np[ControlField.SUMS] and not self._np[ControlField.TRACED]:
            return
        self._np[ControlField.SUMS], self._np[ControlField.TRACED] = sums, traces is not None
        end = len(ControlField)
        if traces is not None:
            self._np[end : end + len(traces)] = traces
            self._np[end + len(traces) :] = 0
            end = len(self._np)
        if self.control is not self.control_host:
            # A fresh pinned copy, as in `StepMetadata.update`.
            self.control[:end].copy_(self.control_host[:end].pin_memory(), non_blocking=True)


def token_addresses(trace: torch.Tensor, positions: Sequence[int] | np.ndarray) -> np.ndarray:
    """[n] int64: where the tokens of these positions lie in a buffer of `RoutingProbe.trace`; 0 beyond its end.
    The buffer must outlive the steps that are given these addresses."""
    at = np.asarray(positions, dtype=np.int64)
    inside = (at >= 0) & (at < trace.shape[0])
    return np.where(inside, trace.data_ptr() + at * trace.stride(0) * trace.element_size(), 0)
