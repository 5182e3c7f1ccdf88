"""The gate in Triton: from router logits to routing weights, of the tokens of one program. See `reference.gate`."""

# Triton has no type information, and kernels are no Python functions:
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from hydra_kernels.ops.shrink import load_z

# The gate's sum over the heads is taken in integers of this unit: integers add up to the same in any order, and
# the order of a reduction follows the tile's layout. 2^-40 is far below the last bit of a float32 sum >= 1.
SUM_UNIT = tl.constexpr(2.0**-40)
SUM_SCALE = tl.constexpr(2.0**40)

# What a head that is no number adds to that sum, so that it is seen without a reduction of its own: more than any
# other heads could add, and little enough for more than a hundred of them.
NAN_PART = tl.constexpr(2.0**55)


@triton.jit
def load_logits(
    p_logits, p_bias, o_head, heads, routed, biased, taken, p_carry, m_token, split_stride, SPLITS: tl.constexpr,
    CARRY: tl.constexpr,
):  # fmt: skip
    """Router logits [T, H] of the heads in o_head [H]: 0 without a router (routed 0), -inf beyond the heads.

    With CARRY and taken > 0 they are those at p_carry [T, 1], which another layer left.
    """
    m_routed = m_token[:, None] & (o_head < routed)[None, :]
    logits = load_z(p_logits + o_head[None, :], m_routed, split_stride, SPLITS)
    bias = tl.load(p_bias + o_head, mask=o_head < biased, other=0.0)
    logits += bias[None, :]
    if CARRY:
        m_taken = m_token[:, None] & (o_head < taken)[None, :]
        if taken > 0:
            logits += tl.load(p_carry + o_head[None, :], mask=m_taken, other=0.0)
    return tl.where((o_head < heads)[None, :], logits, float("-inf"))


@triton.jit
def _kept(logits, o_head, last, last_head):
    """Whether top-k keeps a head, by the logit and the head that it kept last: the larger, of equals the first."""
    return (logits > last) | ((logits == last) & (o_head[None, :] <= last_head))


@triton.jit
def gate_of(logits, top_k, renormalize, BLOCK_HEADS: tl.constexpr):
    """What turns logit g of head e into its weight: exp(g - most) / total where `_kept(g, e, last, last_head)`.

    logits: [T, E]. Returns (most, total, last, last_head), each [T, 1]. See `reference.gate`. A logit that is NaN (or
    infinite) makes the token's total NaN, for maxima, comparisons and integers would lose it.
    """
    o_head = tl.arange(0, BLOCK_HEADS)
    most = tl.max(logits, axis=1, keep_dims=True)
    last = tl.full(most.shape, float("-inf"), tl.float32)
    last_head = tl.full(most.shape, BLOCK_HEADS, tl.int32)
    rest = logits
    for _ in range(top_k):
        last = tl.max(rest, axis=1, keep_dims=True)
        last_head = tl.min(tl.where(rest == last, o_head[None, :], BLOCK_HEADS), axis=1, keep_dims=True)
        rest = tl.where(o_head[None, :] == last_head, float("-inf"), rest)
    p = tl.exp(logits - most)
    counted = (renormalize == 0) | _kept(logits, o_head, last, last_head)
    parts = tl.where(p != p, NAN_PART, tl.where(counted, p * SUM_SCALE, 0.0)).to(tl.int64)
    parts = tl.sum(parts, axis=1, keep_dims=True)
    total = tl.where(parts < tl.cast(NAN_PART, tl.int64), parts.to(tl.float32) * SUM_UNIT, float("nan"))
    return most, total, last, last_head


@triton.jit
def routing_weights(logits, o_head, gate):
    """Routing weights [T, H] of the heads in o_head [H], from their logits; NaN all of them where the total is."""
    most, total, last, last_head = gate
    kept = _kept(logits, o_head, last, last_head) | (total != total)
    return tl.where(kept, tl.exp(logits - most) / total, 0.0)
