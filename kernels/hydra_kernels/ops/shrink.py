"""Shrink in Triton: z = [A; R] x for every token that has a slot, as one or more partial sums over `in`.

The order of the sum over `in` is fixed by `in` alone, so that a row's result depends neither on its batch nor on
how the work was spread: `in` is cut into at most 16 *chunks*; a chunk is summed by the matrix instruction, four
chunks one after another make a *group*, groups one after another make z. A program takes 1, 4 or all 16 chunks of
a tile, and whoever reads the partial sums (expand, or `sum_partials`) goes on in the same order.

The product is computed transposed, [rows, tokens]: rows stay under 64, so that on Hopper both tile sizes use the
same matrix instruction, whatever the number of tokens.
"""

# Triton has no type information, and kernels are no Python functions:
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hydra_kernels.metadata import NUM_TILES, TILE_SIZES, buffer_parts, max_tiles
from hydra_kernels.tuning import ShrinkConfig, shrink_config
from hydra_kernels.tuning.config import GROUP_CHUNKS, chunk_size, power_of_two
from hydra_kernels.weights import LAYOUT_FIELDS, LayoutField

# What the kernels know of other files.
GROUP = tl.constexpr(GROUP_CHUNKS)
RECORD = tl.constexpr(LAYOUT_FIELDS)
RANK = tl.constexpr(int(LayoutField.RANK))
HEADS = tl.constexpr(int(LayoutField.HEADS))
SHARED_A = tl.constexpr(int(LayoutField.SHARED_A))
HAS_ROUTER = tl.constexpr(int(LayoutField.HAS_ROUTER))


@triton.jit
def load_tile(meta_ptr, i_tile, count_at, tiles_at):
    """(whether the tile exists, slot, start into order, tokens). All loads are issued at once."""
    p_tile = meta_ptr + tiles_at + 3 * i_tile
    exists = i_tile < tl.load(meta_ptr + count_at)
    return exists, tl.load(p_tile).to(tl.int64), tl.load(p_tile + 1), tl.load(p_tile + 2)


@triton.jit
def load_layout(p_layout, mask):
    """(rank, heads, rows of A, rows of [A; R]) of layout records; all 0 where there is no adapter or no mask."""
    rank = tl.load(p_layout + RANK, mask=mask, other=0)
    heads = tl.load(p_layout + HEADS, mask=mask, other=0)
    shared = tl.load(p_layout + SHARED_A, mask=mask, other=0)
    router = tl.load(p_layout + HAS_ROUTER, mask=mask, other=0)
    a_rows = tl.where(shared != 0, rank, rank * heads)
    return rank, heads, a_rows, a_rows + tl.where(router != 0, heads, 0)


@triton.jit
def _load_group(p_z, mask, split_stride, COUNT: tl.constexpr):
    group = tl.load(p_z, mask=mask, other=0.0)
    for i in tl.static_range(1, COUNT):
        group += tl.load(p_z + i * split_stride, mask=mask, other=0.0)
    return group


@triton.jit
def load_z(p_z, mask, split_stride, SPLITS: tl.constexpr):
    """The sum of the partials at p_z, in the order of the module's docstring.

    More partials than a group has chunks are always single chunks; up to so many, both readings are the same sum.
    """
    if SPLITS <= GROUP:
        return _load_group(p_z, mask, split_stride, SPLITS)
    total = tl.zeros(p_z.shape, tl.float32)
    # Not unrolled: the loads of one group at a time are as many as the registers hold.
    for _ in tl.range(0, SPLITS // GROUP, num_stages=1):
        total += _load_group(p_z, mask, split_stride, GROUP)
        p_z += GROUP * split_stride
    REST: tl.constexpr = SPLITS - SPLITS // GROUP * GROUP
    if REST > 0:
        total += _load_group(p_z, mask, split_stride, REST)
    return total


@triton.jit(do_not_specialize=["tokens", "count_at", "tiles_at", "order_at"])
def _shrink_kernel(
    z_ptr,  # [splits, SLICES, tokens, Z_ROWS] float32
    x_ptr,  # [tokens, in]
    a_ptr,  # [slots, SLICES, ROWS, in]
    layout_ptr,  # [slots, SLICES, 8]
    meta_ptr,
    tokens,
    in_features,
    x_stride,
    chunk,
    count_at,
    tiles_at,
    order_at,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,  # chunks of one program
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_IN divides in_features
    PDL: tl.constexpr,
):
    ROW_BLOCKS: tl.constexpr = (ROWS + BLOCK_ROWS - 1) // BLOCK_ROWS
    i_part = tl.program_id(0) % (SLICES * ROW_BLOCKS)  # fastest: the slices of a tile share x in the cache
    i_tile = tl.program_id(0) // (SLICES * ROW_BLOCKS)
    i_split = tl.program_id(1)
    i_slice = i_part // ROW_BLOCKS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    exists, slot, start, count = load_tile(meta_ptr, i_tile, count_at, tiles_at)
    if not exists:
        return
    _, _, _, z_rows = load_layout(layout_ptr + (slot * SLICES + i_slice) * RECORD, exists)
    o_row = (i_part % ROW_BLOCKS) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if (i_part % ROW_BLOCKS) * BLOCK_ROWS >= z_rows:
        return
    o_token = tl.arange(0, BLOCK_TOKENS)
    m_token, m_row = o_token < count, o_row < z_rows
    token = tl.load(meta_ptr + order_at + start + o_token, mask=m_token, other=0).to(tl.int64)

    begin = i_split * CHUNKS * chunk
    o_in = begin + tl.arange(0, BLOCK_IN)
    p_x = x_ptr + token[None, :] * x_stride + o_in[:, None]
    p_a = a_ptr + ((slot * SLICES + i_slice) * ROWS + o_row)[:, None] * in_features + o_in[None, :]
    steps_of_chunk = chunk // BLOCK_IN
    steps = tl.minimum(CHUNKS * steps_of_chunk, tl.cdiv(in_features - begin, BLOCK_IN))
    acc = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=tl.float32)
    group = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=tl.float32)
    for i in range(steps):
        m_in = tl.full([BLOCK_IN], True, tl.int1) if EVEN else o_in + i * BLOCK_IN < in_features
        b_a = tl.load(p_a, mask=m_row[:, None] & m_in[None, :], other=0.0)  # [BR, BI]
        b_x = tl.load(p_x, mask=m_in[:, None] & m_token[None, :], other=0.0)  # [BI, BT]
        acc = tl.dot(b_a, b_x, acc, input_precision="ieee")
        p_a += BLOCK_IN
        p_x += BLOCK_IN
        if CHUNKS > 1 and (i + 1) % steps_of_chunk == 0:
            group += acc
            acc = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=tl.float32)
            if CHUNKS > GROUP and (i + 1) % (steps_of_chunk * GROUP) == 0:
                total += group
                group = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=tl.float32)
    result = total + (group + acc)

    p_z = z_ptr + ((tl.cast(i_split, tl.int64) * SLICES + i_slice) * tokens + token)[None, :] * Z_ROWS + o_row[:, None]
    tl.store(p_z, result, mask=m_row[:, None] & m_token[None, :])


@triton.jit(do_not_specialize=["tokens", "token_slot_at"])
def _sum_kernel(
    z_ptr,  # [SLICES, tokens, ROWS] float32
    partial_ptr,  # [SPLITS, SLICES, tokens, Z_ROWS] float32
    layout_ptr,  # [slots, SLICES, 8]
    meta_ptr,
    tokens,
    token_slot_at,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    i_slice = tl.program_id(1) % SLICES
    o_row = tl.program_id(1) // SLICES * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    m_token = o_token < tokens
    slot = tl.load(meta_ptr + token_slot_at + o_token, mask=m_token, other=-1).to(tl.int64)
    _, _, _, z_rows = load_layout(layout_ptr + (slot * SLICES + i_slice) * RECORD, slot >= 0)
    o_z = tl.cast(i_slice, tl.int64) * tokens + o_token
    p_partial = partial_ptr + o_z[:, None] * Z_ROWS + o_row[None, :]
    split_stride = tl.cast(tokens, tl.int64) * SLICES * Z_ROWS
    z = load_z(p_partial, o_row[None, :] < z_rows[:, None], split_stride, SPLITS)
    tl.store(z_ptr + o_z[:, None] * ROWS + o_row[None, :], z, mask=m_token[:, None] & (o_row < ROWS)[None, :])


def tile_grid(meta_host: torch.Tensor, tile: int, tokens: int, max_slots: int, device: torch.device) -> int:
    """How many tiles to launch programs for: those of this step, or, in a CUDA graph, those that any step can have.

    A captured launch is replayed with other steps; programs beyond a step's own tiles exit at once.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return max_tiles(tile, tokens, max_slots)
    return int(meta_host[NUM_TILES + TILE_SIZES.index(tile)])


def tile_offsets(tile: int, max_tokens: int, max_slots: int) -> tuple[int, int, int]:
    """Where the kernels find the number of tiles, the tiles and the order in the metadata buffer."""
    parts = buffer_parts(max_tokens, max_slots)
    return NUM_TILES + TILE_SIZES.index(tile), parts[f"tiles_{tile}"].start, parts["order"].start


def shrink_partials(
    x: torch.Tensor,
    a: torch.Tensor,
    layout: torch.Tensor,
    meta_host: torch.Tensor,
    meta_device: torch.Tensor,
    max_tokens: int,
    max_slots: int,
    config: ShrinkConfig | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Partial sums of z = [A; R] x over splits of `in`, [splits, slices, T, >= rows] float32, in one launch.

        for split, (token, slot) in splits, tokens with a slot:  for each slice that the slot adapts:
            z[split, slice, token, :z_rows] = a[slot, slice, :z_rows, split] @ x[token, split]

    x:           [T, in], rows contiguous, of a's dtype.
    a:           [slots, slices, rows, in], contiguous.
    layout:      [slots, slices, 8] int32, see `LayoutField`.
    meta_host, meta_device: the buffer of a `StepMetadata(max_tokens, max_slots)`, which has at most T tokens.
    config:      block sizes, default `tuning.shrink_config`. They do not change a bit of the sum over splits.
    pdl:         let the next kernel of the stream start early, see `ExpandConfig.pdl`.

    Nothing else of z is written: it is NaN, or anything, where there is no slot and beyond a slot's own rows. Its last
    dimension is rounded up to a multiple of 4, so that expand can load 16 bytes at once. Bitwise repeatable; a row
    does not depend on its neighbours; no synchronisation with the host.
    """
    tokens, in_features = x.shape
    _, slices, rows, _ = a.shape
    config = config or shrink_config(x.device, x.dtype, tokens, in_features, rows, slices)
    z_rows = -(-rows // 4) * 4
    z = torch.empty(config.splits(in_features), slices, tokens, z_rows, dtype=torch.float32, device=x.device)
    tiles = tile_grid(meta_host, config.tile, tokens, max_slots, x.device)
    _shrink_kernel[(tiles * slices * -(-rows // config.block_rows), z.shape[0])](
        z,
        x,
        a,
        layout,
        meta_device,
        tokens,
        in_features,
        x.stride(0),
        chunk_size(in_features),
        *tile_offsets(config.tile, max_tokens, max_slots),
        SLICES=slices,
        ROWS=rows,
        Z_ROWS=z_rows,
        CHUNKS=config.chunks,
        BLOCK_TOKENS=config.tile,
        BLOCK_ROWS=config.block_rows,
        BLOCK_IN=config.block_in,
        EVEN=in_features % config.block_in == 0,
        PDL=pdl,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=False,  # contraction may differ between block sizes
    )
    return z


def sum_partials(
    z_partial: torch.Tensor, rows: int, layout: torch.Tensor, meta_device: torch.Tensor, max_tokens: int, max_slots: int
) -> torch.Tensor:
    """z [slices, T, rows] from `shrink_partials`, in the order in which expand sums; 0 where there is no slot.

    For row-parallel layers, whose z goes through an all-reduce: every element is written, without a memset.
    """
    splits, slices, tokens, z_rows = z_partial.shape
    z = torch.empty(slices, tokens, rows, dtype=torch.float32, device=z_partial.device)
    block_rows = min(power_of_two(rows), 64)
    _sum_kernel[(-(-tokens // 16), slices * -(-rows // block_rows))](
        z,
        z_partial,
        layout,
        meta_device,
        tokens,
        buffer_parts(max_tokens, max_slots)["token_slot"].start,
        SLICES=slices,
        ROWS=rows,
        Z_ROWS=z_rows,
        SPLITS=splits,
        BLOCK_TOKENS=16,
        BLOCK_ROWS=block_rows,
        num_warps=4,
        enable_fp_fusion=False,  # as in the other kernels; there is nothing here that could be contracted
    )
    return z


def shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    layout: torch.Tensor,
    meta_host: torch.Tensor,
    meta_device: torch.Tensor,
    max_tokens: int,
    max_slots: int,
    config: ShrinkConfig | None = None,
) -> torch.Tensor:
    """z = [A; R] x, [slices, T, rows] float32, 0 where there is no slot; arguments as in `shrink_partials`."""
    z = shrink_partials(x, a, layout, meta_host, meta_device, max_tokens, max_slots, config)
    return sum_partials(z, a.shape[2], layout, meta_device, max_tokens, max_slots)
