"""Block sizes of the Triton kernels, and the limits within which they change the speed but not one bit.

What fixes the result of a row: the order of the sums over `in` and over K, and the matrix instruction. The order is
`chunk_size` and GROUP_CHUNKS (see ops/shrink.py), which depend on `in` alone; K is summed from its first column to
its last. The instruction follows from the limits below: shrink multiplies fewer than 64 rows at once, expand at
least 64 with whole warp groups, so that on Hopper the first never and the second always uses wgmma.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_kernels.metadata import TILE_SIZES

MAX_CHUNKS, GROUP_CHUNKS = 16, 4
CHUNK_UNIT = 512  # a chunk is a multiple of it, and every block_in divides it

# Of the defaults. LARGE: tokens from which on tiles alone make enough programs. EXPAND_PROGRAMS: about what runs at
# once on a GPU of 132 multiprocessors, four on each. MAX_BLOCK_K: columns of h that fit the registers. MAX_LOADS: of
# numbers of u by a program of 4 warps, 64 by each thread.
LARGE, EXPAND_PROGRAMS, MAX_BLOCK_K, MAX_LOADS = 2048, 512, 128, 64 * 128


def chunk_size(in_features: int) -> int:
    """Length of the chunks that `in` is summed in: the least multiple of CHUNK_UNIT that makes at most MAX_CHUNKS."""
    return CHUNK_UNIT * -(-in_features // (CHUNK_UNIT * MAX_CHUNKS))


def _check(name: str, got: int, expected: tuple[int, ...]) -> None:
    if got not in expected:
        raise ValueError(f"tuning: got {name} {got}, expected one of {expected}")


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """How a shrink is spread over the GPU.

    tile:       tokens of a program, one of TILE_SIZES.
    chunks:     chunks of `in` of a program: fewer make more programs and more partial sums.
    block_rows: rows of [A; R] of a program.
    block_in:   step along `in`.

    Raises ValueError for sizes that would change results or cannot be.
    """

    tile: int
    chunks: int
    block_rows: int
    block_in: int
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        _check("tile", self.tile, TILE_SIZES)
        _check("chunks", self.chunks, (1, GROUP_CHUNKS, MAX_CHUNKS))
        _check("block_rows", self.block_rows, (16, 32))
        _check("block_in", self.block_in, (16, 32, 64, 128, 256))
        _check("warps", self.warps, (1, 2, 4, 8))

    def splits(self, in_features: int) -> int:
        """Number of partial sums of each z."""
        return -(-in_features // (self.chunks * chunk_size(in_features)))


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """How an expand is spread over the GPU.

    tile:      one of TILE_SIZES.
    tokens:    tokens of a program: a whole tile or a part of it.
    block_out: rows of B at once.
    out_steps: how many such blocks a program goes through; the gate is computed once for all of them.
    block_k:   columns of B at once. Slots with more columns than this need out_steps 1.
    registers: limit for a thread, so that more programs share a multiprocessor; 0: the compiler's own choice.
    pdl:       start while shrink still runs and wait on the GPU (programmatic dependent launch, Hopper on).

    Raises ValueError for sizes that would change results or cannot be.
    """

    tile: int
    tokens: int
    block_out: int
    out_steps: int
    block_k: int
    warps: int = 4
    stages: int = 2
    registers: int = 0
    pdl: bool = False

    def __post_init__(self) -> None:
        _check("tile", self.tile, TILE_SIZES)
        _check("tokens", self.tokens, tuple(n for n in (16, 32, 64) if n <= self.tile))
        _check("block_out", self.block_out, (64, 128, 256))
        _check("out_steps", self.out_steps, (1, 2, 4, 8, 16))
        _check("block_k", self.block_k, (16, 32, 64, 128, 256))
        _check("warps", self.warps, (4, 8))
        _check("registers", self.registers, (0, 64, 80, 96, 128, 160, 192))


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def default_shrink(tokens: int, in_features: int, rows: int, slices: int, itemsize: int) -> ShrinkConfig:
    """Sizes for want of measured ones, by arithmetic for one adapter in the batch; more adapters make more programs.

    Splits give a GPU with few tiles enough programs, but expand reads every partial sum again for each of its own
    programs: so there are no more of them than it takes to keep about two megabytes of loads under way.
    """
    if itemsize == 4:  # no tensor cores: the product is unrolled in registers
        return ShrinkConfig(16, 1 if tokens <= 256 else GROUP_CHUNKS, 16, 32, stages=2)
    block_rows = 16 if rows <= 16 else 32
    parts = slices * -(-rows // block_rows)
    if tokens >= LARGE:  # one partial sum, with which the h of 64 tokens fits expand's registers
        if tokens // 64 * parts >= 128:
            return ShrinkConfig(64, MAX_CHUNKS, block_rows, 128)
        return ShrinkConfig(16, MAX_CHUNKS, block_rows, 128, stages=4)
    block_in = 256 if block_rows == 16 else 128
    fewer = ShrinkConfig(16, GROUP_CHUNKS, block_rows, block_in, stages=4)
    programs = -(-tokens // 16) * parts * fewer.splits(in_features)
    return fewer if programs >= 48 else ShrinkConfig(16, 1, block_rows, block_in)


def default_expand(tokens: int, out: int, k: int, itemsize: int, splits: int) -> ExpandConfig:
    """Sizes for want of measured ones, by arithmetic for one adapter in the batch; more adapters make more programs.

    B is read once for each block of tokens, from the L2 mostly, and y once: with 16 tokens and K = 128 four bytes of
    B come for each byte of y, with 64 one. The gate and h are made once for all blocks of out of a program, so a
    program goes through as many as leave `EXPAND_PROGRAMS`.

    Compilers like to unroll the sum over partial sums and have all of its loads under way at once: for 32 tokens,
    K = 128 and 8 splits 256 numbers of u for each thread of 4 warps, which has 255 registers. Above `MAX_LOADS` it is
    8 warps: at most 128 registers, so that two programs share a multiprocessor; but up to 189 on sm_80 with 3 or 4
    splits and out_steps 1, so that one has it. 16 tokens never need more than 185, with 4 warps.
    """
    if itemsize == 4:  # no tensor cores: several blocks of K, each of which is built in registers
        return ExpandConfig(16, 16, 64, 1, 32)
    tile, block = (16, 16) if tokens <= 64 else (64, 32) if tokens < LARGE else (64, 64)
    block, block_k = (block, max(power_of_two(k), 16)) if k <= MAX_BLOCK_K else (min(block, 32), 64)
    warps = 8 if block >= 32 and block * block_k * splits > MAX_LOADS else 4
    if k > MAX_BLOCK_K:
        # With one partial sum the loop over K needs up to 155 registers. Three programs have 160 each; without the
        # limit ptxas tries to make room for a fourth, at 128, and spills.
        registers = 160 if splits == 1 and block >= 32 else 0
        return ExpandConfig(tile, block, 64, 1, block_k, warps, registers=registers)
    programs = -(-tokens // block) * -(-out // 64)
    out_steps = next(steps for steps in (8, 4, 2, 1) if programs // steps >= EXPAND_PROGRAMS or steps == 1)
    return ExpandConfig(tile, block, 64, out_steps, block_k, warps)
