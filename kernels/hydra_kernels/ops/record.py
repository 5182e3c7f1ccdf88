"""What a `RoutingProbe` is told by the Triton expand: the routing weights that it has in registers anyway.

Only steps that are counted or traced pay for it, and only the first program of a tile and slice. Sums over tokens go
to the probe with atomic additions, the only ones there are: their order is not fixed, so the last bits of these
float64 counters may differ from run to run. Nothing that a token gets depends on them.
"""

# Triton has no type information, and kernels are no Python functions:
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from hydra_kernels.probe import ControlField

SUMS = tl.constexpr(int(ControlField.SUMS))
TRACED = tl.constexpr(int(ControlField.TRACED))
ROUTERS = tl.constexpr(int(ControlField.ROUTERS))
HEADS = tl.constexpr(int(ControlField.HEADS))
TRACES = tl.constexpr(len(ControlField))


@triton.jit
def record(probe_ptr, w, o_head, routed, token, m_token, slot, router):
    """Record w [T, E] of the heads under `routed` for the tokens [T] of `slot`."""
    sums_at, traced = tl.load(probe_ptr + SUMS), tl.load(probe_ptr + TRACED)
    probe_heads = tl.load(probe_ptr + HEADS)
    m_head = o_head < routed
    if traced != 0:
        trace_at = tl.load(probe_ptr + TRACES + token, mask=m_token, other=0)
        address = trace_at[:, None] + ((router * probe_heads + o_head) * 4)[None, :]
        m_trace = (trace_at != 0)[:, None] & m_head[None, :]
        tl.store(address.to(tl.pointer_type(tl.float32)), w, mask=m_trace)
    if sums_at != 0:
        counted = tl.where(m_token[:, None] & m_head[None, :], w, 0.0)
        row = (slot * tl.load(probe_ptr + ROUTERS) + router) * (probe_heads + 1)
        p_sums = (sums_at + (row + o_head) * 8).to(tl.pointer_type(tl.float64))
        tl.atomic_add(p_sums, tl.sum(counted.to(tl.float64), axis=0), mask=m_head)
        parts = tl.where(counted > 0, counted * tl.log(tl.where(counted > 0, counted, 1.0)), 0.0)
        entropy = -tl.sum(tl.sum(parts.to(tl.float64), axis=1), axis=0)
        tl.atomic_add((sums_at + (row + probe_heads) * 8).to(tl.pointer_type(tl.float64)), entropy)
