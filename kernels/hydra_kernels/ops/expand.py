"""Expand in Triton: sums z, applies the gate, and adds [s*B_0 | ... | s*B_{E-1}] h to y; h never leaves the chip.

The product is computed transposed, [out, tokens], with at least 64 rows of B, so that on Hopper both tile sizes use
the same matrix instruction, and every sum starts from y and runs through K from its first column to its last: a
row's result does not depend on its batch.

K is worked on in *units* of 8 columns of one head (16 bytes of B). h is then the weight of the unit's head times 8
numbers of u that lie side by side in z, and needs no gather. Heads whose rank is no multiple of 8 end with a part of
a unit, and take the slower of two ways through the kernel, which loads B column by column.
"""

# Triton has no type information, and kernels are no Python functions:
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from hydra_kernels.ops.gate import gate_of, load_logits, routing_weights
from hydra_kernels.ops.record import record
from hydra_kernels.ops.shrink import HAS_ROUTER, RECORD, load_layout, load_tile, load_z, tile_grid, tile_offsets
from hydra_kernels.tuning import ExpandConfig, expand_config
from hydra_kernels.tuning.config import power_of_two
from hydra_kernels.weights import Carry, LayoutField

TOP_K = tl.constexpr(int(LayoutField.TOP_K))
RENORMALIZE = tl.constexpr(int(LayoutField.RENORMALIZE))
HAS_BIAS = tl.constexpr(int(LayoutField.HAS_BIAS))
CARRY_FIELD = tl.constexpr(int(LayoutField.CARRY))
GIVES = tl.constexpr(int(Carry.GIVES))
TAKES = tl.constexpr(int(Carry.TAKES))

UNIT = tl.constexpr(8)


@triton.jit
def _find_slice(slice_start_ptr, i_out, SLICES: tl.constexpr, PROGRAM_OUT: tl.constexpr, ALIGN: tl.constexpr):
    """(slice, first column, end) of the program's columns of y; column >= end: none."""
    i_slice, column, end, first = 0, 0, 0, 0
    for i in tl.static_range(SLICES):
        slice_begin = tl.load(slice_start_ptr + i)
        slice_end = tl.load(slice_start_ptr + i + 1)
        programs = tl.cdiv(slice_end - slice_begin, PROGRAM_OUT)
        mine = (i_out >= first) & (i_out < first + programs)
        i_slice = tl.where(mine, i, i_slice)
        column = tl.where(mine, slice_begin + (i_out - first) * PROGRAM_OUT, column)
        end = tl.where(mine, tl.minimum(slice_end, column + PROGRAM_OUT), end)
        first += programs
    return i_slice, tl.multiple_of(column, ALIGN), tl.multiple_of(end, ALIGN)


@triton.jit
def _load_b(p_b, i_k, rank, heads, m_out, ALIGNED: tl.constexpr, BLOCK_K: tl.constexpr):
    """[OUT, K] of B: the columns of the block's units, 0 where a unit has none."""
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    if ALIGNED:
        m_k = o_k < heads * rank
    else:
        padded_rank = tl.cdiv(rank, UNIT) * UNIT
        head = o_k // padded_rank
        column = o_k - head * padded_rank
        m_k = (head < heads) & (column < rank)
        o_k = head * rank + column
    return tl.load(p_b + o_k[None, :], mask=m_out[:, None] & m_k[None, :], other=0.0)


@triton.jit
def _build_h(
    z,
    adapter,
    gate,
    i_k,
    dtype: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CARRY: tl.constexpr,
):
    """h transposed, [K, T], of the block's units."""
    p_z, m_token, split_stride = z
    rank, heads, a_rows, routed, biased, p_bias, taken, p_carry = adapter
    unit = i_k * (BLOCK_K // UNIT) + tl.arange(0, BLOCK_K // UNIT)
    units_of_head = tl.cdiv(rank, UNIT)
    head = unit // units_of_head
    logits = load_logits(
        p_z + a_rows, p_bias, head, heads, routed, biased, taken, p_carry, m_token, split_stride, SPLITS, CARRY
    )
    w = routing_weights(logits, head, gate)  # [T, U]

    in_head = (unit - head * units_of_head) * UNIT
    row = in_head + head * tl.where(a_rows == rank, 0, rank)
    o_unit = tl.arange(0, UNIT)[None, :]
    m_row = (head < heads)[:, None]
    if not ALIGNED:
        m_row = m_row & (in_head[:, None] + o_unit < rank)
    m_u = m_token[:, None, None] & m_row[None, :, :]
    u = load_z(p_z[:, :, None] + (row[:, None] + o_unit)[None, :, :], m_u, split_stride, SPLITS)  # [T, U, 8]
    h = tl.reshape(w[:, :, None] * u, (BLOCK_TOKENS, BLOCK_K))
    return tl.trans(h.to(dtype))


@triton.jit
def _add_block(
    p_y,
    m_y,
    b_y,
    p_b,
    m_out,
    b_b,
    b_h,
    z,
    adapter,
    gate,
    K_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CARRY: tl.constexpr,
):
    """y += B h for one block of out, whose y and first blocks of B and h are given."""
    acc = tl.dot(b_b, b_h, b_y.to(tl.float32), input_precision="ieee")
    if not ALIGNED or K_STRIDE > BLOCK_K:
        rank, heads = adapter[0], adapter[1]
        # One stage: h is not to be computed ahead.
        for i_k in tl.range(1, tl.cdiv(heads * tl.cdiv(rank, UNIT) * UNIT, BLOCK_K), num_stages=1):
            b_b = _load_b(p_b, i_k, rank, heads, m_out, ALIGNED, BLOCK_K)
            b_h = _build_h(z, adapter, gate, i_k, b_b.dtype, SPLITS, ALIGNED, BLOCK_TOKENS, BLOCK_K, CARRY)
            acc = tl.dot(b_b, b_h, acc, input_precision="ieee")
    tl.store(p_y, acc.to(b_y.dtype), mask=m_y)


@triton.jit
def _add_delta(
    p_y,  # [BO, BT]
    p_b,  # [BO, 1]
    columns,  # of y, from p_y on
    z,
    rank,
    heads,
    a_rows,
    p_bias,
    p_layout,
    probe,
    p_carry,  # [BT, 1]
    K_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    OUT_STEPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    PROBE: tl.constexpr,
    CARRY: tl.constexpr,
    PDL: tl.constexpr,
):
    """The gate, and y += B h for a program's columns of y."""
    p_z, m_token, split_stride = z
    if ALIGNED:
        rank = rank // UNIT * UNIT  # the same number, but now the compiler knows
    m_out = tl.arange(0, BLOCK_OUT) < columns
    m_y = m_out[:, None] & m_token[None, :]
    if OUT_STEPS == 1:
        # B and y do not depend on z: their loads are under way while the gate is computed.
        b_b = _load_b(p_b, 0, rank, heads, m_out, ALIGNED, BLOCK_K)  # [BO, BK]
        b_y = tl.load(p_y, mask=m_y, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()

    routed = tl.where(tl.load(p_layout + HAS_ROUTER) != 0, heads, 0)
    biased = tl.where(tl.load(p_layout + HAS_BIAS) != 0, heads, 0)
    carry = tl.load(p_layout + CARRY_FIELD)
    taken = tl.where(carry == TAKES, heads, 0)
    o_head = tl.arange(0, BLOCK_HEADS)
    logits = load_logits(
        p_z + a_rows, p_bias, o_head, heads, routed, biased, taken, p_carry, m_token, split_stride, SPLITS, CARRY
    )
    top_k = tl.where(routed + taken > 0, tl.load(p_layout + TOP_K), 0)  # of a uniform mixture, all heads count
    gate = gate_of(logits, top_k, tl.load(p_layout + RENORMALIZE), BLOCK_HEADS)
    if CARRY:
        gives = probe[4] & (carry == GIVES)
        if gives:
            tl.store(p_carry + o_head[None, :], logits, mask=m_token[:, None] & (o_head < heads)[None, :])
    if PROBE:
        probe_ptr, token, slot, router, recorder = probe
        if recorder & (routed > 0):
            record(probe_ptr, routing_weights(logits, o_head, gate), o_head, routed, token, m_token, slot, router)
    adapter = (rank, heads, a_rows, routed, biased, p_bias, taken, p_carry)
    b_h = _build_h(z, adapter, gate, 0, p_b.dtype.element_ty, SPLITS, ALIGNED, BLOCK_TOKENS, BLOCK_K, CARRY)  # [BK, BT]

    if OUT_STEPS == 1:
        _add_block(
            p_y,
            m_y,
            b_y,
            p_b,
            m_out,
            b_b,
            b_h,
            z,
            adapter,
            gate,
            K_STRIDE,
            SPLITS,
            ALIGNED,
            BLOCK_TOKENS,
            BLOCK_K,
            CARRY,
        )
    else:
        for i in range(tl.cdiv(columns, BLOCK_OUT)):
            m_out = i * BLOCK_OUT + tl.arange(0, BLOCK_OUT) < columns
            m_y = m_out[:, None] & m_token[None, :]
            b_y = tl.load(p_y, mask=m_y, other=0.0)
            b_b = _load_b(p_b, 0, rank, heads, m_out, ALIGNED, BLOCK_K)
            _add_block(
                p_y,
                m_y,
                b_y,
                p_b,
                m_out,
                b_b,
                b_h,
                z,
                adapter,
                gate,
                K_STRIDE,
                SPLITS,
                ALIGNED,
                BLOCK_TOKENS,
                BLOCK_K,
                CARRY,
            )
            p_y += BLOCK_OUT
            p_b += BLOCK_OUT * K_STRIDE


@triton.jit(do_not_specialize=["tokens", "programs", "count_at", "tiles_at", "order_at", "first_router"])
def _expand_kernel(
    y_ptr,  # [tokens, >= out]
    z_ptr,  # [SPLITS, SLICES, tokens, ROWS] float32
    b_ptr,  # [slots, out, K_STRIDE]
    layout_ptr,  # [slots, SLICES, 8]
    bias_ptr,  # [slots, SLICES, HEADS] float32
    slice_start_ptr,  # [SLICES + 1]
    meta_ptr,
    probe_ptr,  # control of a `RoutingProbe`, if PROBE
    carry_ptr,  # [>= tokens, HEADS] float32, if CARRY
    tokens,
    out,
    y_stride,
    programs,  # of one block of tokens
    count_at,
    tiles_at,
    order_at,
    first_router,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    K_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGN: tl.constexpr,  # divides the slices' bounds
    BLOCKS_OF_TILE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    OUT_STEPS: tl.constexpr,  # blocks of out of one program
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    PROBE: tl.constexpr,
    CARRY: tl.constexpr,
    PDL: tl.constexpr,
):
    i_out = tl.program_id(0) % programs
    i_block = tl.program_id(0) // programs
    exists, slot, start, count = load_tile(meta_ptr, i_block // BLOCKS_OF_TILE, count_at, tiles_at)
    first_token = i_block % BLOCKS_OF_TILE * BLOCK_TOKENS
    i_slice, column, end = _find_slice(slice_start_ptr, i_out, SLICES, BLOCK_OUT * OUT_STEPS, ALIGN)
    if (not exists) | (first_token >= count):
        return
    i_record = slot * SLICES + i_slice
    p_layout, p_bias = layout_ptr + i_record * RECORD, bias_ptr + i_record * HEADS
    rank, heads, a_rows, _ = load_layout(p_layout, exists)
    if (rank == 0) | (column >= end):
        return
    o_token = first_token + tl.arange(0, BLOCK_TOKENS)
    m_token = o_token < count
    token = tl.load(meta_ptr + order_at + start + o_token, mask=m_token, other=0).to(tl.int64)
    o_out = column + tl.arange(0, BLOCK_OUT)
    p_y = y_ptr + token[None, :] * y_stride + o_out[:, None]
    p_b = b_ptr + (slot * out + o_out)[:, None] * K_STRIDE
    p_z = z_ptr + ((tl.cast(i_slice, tl.int64) * tokens + token) * ROWS)[:, None]
    z = (p_z, m_token, tl.cast(tokens, tl.int64) * SLICES * ROWS)
    p_carry = (carry_ptr + token * HEADS)[:, None]
    # The first program of a slice records the gate; each of them computes it.
    probe = (probe_ptr, token, slot, first_router + i_slice, column == tl.load(slice_start_ptr + i_slice))
    # fmt: off
    if rank % UNIT == 0:
        _add_delta(
            p_y, p_b, end - column, z, rank, heads, a_rows, p_bias, p_layout, probe, p_carry, K_STRIDE, SPLITS, True,
            BLOCK_TOKENS, BLOCK_OUT, OUT_STEPS, BLOCK_K, BLOCK_HEADS, PROBE, CARRY, PDL,
        )
    else:
        _add_delta(
            p_y, p_b, end - column, z, rank, heads, a_rows, p_bias, p_layout, probe, p_carry, K_STRIDE, SPLITS, False,
            BLOCK_TOKENS, BLOCK_OUT, OUT_STEPS, 2 * UNIT, BLOCK_HEADS, PROBE, CARRY, PDL,
        )
    # fmt: on


def _alignment(out_slices: Sequence[int]) -> int:
    """The largest power of two up to 16 that divides where each slice begins and ends."""
    return next(n for n in (16, 8, 4, 2, 1) if all(out % n == 0 for out in out_slices))


def expand_(
    y: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    layout: torch.Tensor,
    bias: torch.Tensor,
    slice_start: torch.Tensor,
    out_slices: Sequence[int],
    meta_host: torch.Tensor,
    meta_device: torch.Tensor,
    max_tokens: int,
    max_slots: int,
    config: ExpandConfig | None = None,
    probe: torch.Tensor | None = None,
    first_router: int = 0,
    carry: torch.Tensor | None = None,
) -> None:
    """The gate and the product with B, added to y in place, in one launch.

        for token, slot in tokens with a slot:  for each slice that the slot adapts:
            u, g = (z[:, slice, token] summed over splits)[:a_rows], [a_rows:z_rows] + bias
            h = gate(g)[e] * u[j]       column e*r + j; float32, then rounded to b's dtype
            y[token, slice] += b[slot, slice] @ h       summed in float32, rounded once with y

    y:           [T, sum(out_slices)], rows contiguous, of b's dtype; may be a column range of a wider tensor.
    z:           [splits, slices, T, >= rows] of `shrink_partials`, or [slices, T, rows] float32, contiguous.
    b:           [slots, sum(out_slices), k], contiguous, see `StackedSlots`.
    layout, bias, slice_start, out_slices: as in `StackedSlots`.
    meta_host, meta_device: the buffer of a `StepMetadata(max_tokens, max_slots)`, which has at most T tokens.
    config:      block sizes, default `tuning.expand_config`. They do not change a bit of the result. With pdl, y is
                 read before the kernel waits: only for who launched a shrink with pdl just before, so never by default.
    probe:       `RoutingProbe.control`, of which slice i is router `first_router` + i; None to record nothing.
    carry:       `StepMetadata.carry`, with as many heads as the slots; None when no adapter has a shared router.

    Rows without a slot and columns of slices that the slot does not adapt are not touched. Bitwise repeatable; a
    row does not depend on its neighbours; no synchronisation with the host.
    """
    tokens, rows = z.shape[-2:]
    _, out, k = b.shape
    slices, heads = bias.shape[1:]
    splits = z.shape[0] if z.ndim == 4 else 1
    config = config or replace(expand_config(y.device, y.dtype, tokens, out, k, slices, splits), pdl=False)
    programs = sum(-(-width // (config.block_out * config.out_steps)) for width in out_slices)
    tiles = tile_grid(meta_host, config.tile, tokens, max_slots, y.device)
    blocks = config.tile // config.tokens
    _expand_kernel[(tiles * blocks * programs,)](
        y,
        z,
        b,
        layout,
        bias,
        slice_start,
        meta_device,
        meta_device if probe is None else probe,
        bias if carry is None else carry,
        tokens,
        out,
        y.stride(0),
        programs,
        *tile_offsets(config.tile, max_tokens, max_slots),
        first_router,
        SLICES=slices,
        ROWS=rows,
        K_STRIDE=k,
        HEADS=heads,
        SPLITS=splits,
        ALIGN=_alignment(out_slices),
        BLOCKS_OF_TILE=blocks,
        BLOCK_TOKENS=config.tokens,
        BLOCK_OUT=config.block_out,
        OUT_STEPS=config.out_steps,
        BLOCK_K=config.block_k,
        BLOCK_HEADS=power_of_two(heads),
        PROBE=probe is not None,
        CARRY=carry is not None,
        PDL=config.pdl,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=False,  # contraction may differ between block sizes
        **({"maxnreg": config.registers} if config.registers else {}),
        **({"launch_pdl": True} if config.pdl else {}),
    )
