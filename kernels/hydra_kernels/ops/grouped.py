"""The grouped torch path: the same semantics with a few torch calls per adapter of the batch.

Works on any device that torch knows, without a compiler or Triton. It is the CPU fallback, and slow when many
adapters meet in one batch: its cost grows with the number of segments.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from hydra_kernels.metadata import HEADER, NUM_SEGMENTS
from hydra_kernels.probe import ControlField
from hydra_kernels.reference import gate
from hydra_kernels.weights import Carry, Layout


def segments(meta: torch.Tensor, max_slots: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(slot, token ids) for each segment of a host metadata buffer."""
    starts = meta[HEADER + max_slots : HEADER + 2 * max_slots + 1]
    order = meta[HEADER + 2 * max_slots + 1 :]
    for i in range(int(meta[NUM_SEGMENTS])):
        yield int(meta[HEADER + i]), order[int(starts[i]) : int(starts[i + 1])].long()


def layouts(record: list[list[int]]) -> Iterator[tuple[int, Layout]]:
    """(slice, layout) for each slice that the slot's record [slices, 8] adapts."""
    for i, fields in enumerate(record):
        if fields[0]:
            yield i, Layout.of_record(fields)


def record(probe: torch.Tensor, w: torch.Tensor, slot: int, rows: torch.Tensor, router: int) -> None:
    """Leave routing weights w [T, E] of the tokens `rows` [T] of a slot where a `RoutingProbe`'s control says."""
    sums_at, traced, routers, heads = probe[: len(ControlField)].tolist()
    if traced:
        for row, address in zip(w, probe[len(ControlField) + rows].tolist(), strict=True):
            if address:
                _memory(address + 4 * router * heads, w.shape[1], torch.float32).copy_(row)
    if sums_at:
        entropy = -torch.xlogy(w, w).sum(dtype=torch.float64)
        sums = _memory(sums_at + 8 * (slot * routers + router) * (heads + 1), heads + 1, torch.float64)
        sums[: w.shape[1]] += w.sum(dim=0, dtype=torch.float64)
        sums[heads] += entropy


def _memory(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor [count] over memory that something else owns."""
    return torch.frombuffer((ctypes.c_byte * (count * dtype.itemsize)).from_address(address), dtype=dtype)


def shrink(x: torch.Tensor, a: torch.Tensor, layout: torch.Tensor, meta: torch.Tensor, max_slots: int) -> torch.Tensor:
    z = torch.zeros(a.shape[1], x.shape[0], a.shape[2], dtype=torch.float32, device=x.device)
    for slot, rows in segments(meta, max_slots):
        tokens = x[rows].float()  # the gate is sensitive: logits stay in float32
        for i, lay in layouts(layout[slot].tolist()):
            z[i, rows, : lay.z_rows] = tokens @ a[slot, i, : lay.z_rows].float().T
    return z


def expand_(
    y: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    layout: torch.Tensor,
    bias: torch.Tensor,
    out_slices: Sequence[int],
    meta: torch.Tensor,
    max_slots: int,
    probe: torch.Tensor | None = None,
    first_router: int = 0,
    carry: torch.Tensor | None = None,
) -> None:
    start = [0, *accumulate(out_slices)]
    for slot, rows in segments(meta, max_slots):
        for i, lay in layouts(layout[slot].tolist()):
            group = z[i, rows]
            u = group[:, : lay.a_rows]
            u = u[:, None, :] if lay.shared_a else u.view(-1, lay.heads, lay.rank)
            logits = group[:, lay.a_rows : lay.z_rows] if lay.has_router else None
            if logits is not None and lay.has_bias:  # else the slot's bias is what an earlier adapter left there
                logits = logits + bias[slot, i, : lay.heads]
            if carry is not None and lay.carry is Carry.TAKES:
                logits = carry[rows, : lay.heads]
            elif carry is not None and lay.carry is Carry.GIVES and logits is not None:
                carry[rows, : lay.heads] = logits
            w = gate(logits, lay, rows.numel(), torch.float32).to(z.device)
            if lay.has_router and probe is not None and probe.device.type == "cpu":
                record(probe, w, slot, rows, first_router + i)
            h = (w[:, :, None] * u).flatten(1).to(b.dtype)
            y[rows, start[i] : start[i + 1]] += (h @ b[slot, start[i] : start[i + 1], : lay.k].T).to(y.dtype)
