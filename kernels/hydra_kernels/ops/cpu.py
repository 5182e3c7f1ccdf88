"""Slots for the native CPU operator: each adapter at its own size, packed as csrc/kernels_impl.h reads it."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from enum import IntEnum
from itertools import accumulate

import torch

from hydra_kernels.metadata import StepMetadata
from hydra_kernels.ops import build
from hydra_kernels.ops.arena import ALIGNMENT, Arena
from hydra_kernels.slots import LayerSlots, SlotCapacity
from hydra_kernels.weights import HydraWeights

# As in csrc/record.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ROW_GROUP, CHUNK, PANEL = 4, 32, 64

_arena = Arena()


class TableField(IntEnum):
    """Columns of `PackedSlots.table` (int64); the fields of `Record` in csrc/record.h."""

    A = 0
    B = 1
    BIAS = 2
    RANK = 3
    HEADS = 4
    SHARED_A = 5
    TOP_K = 6
    RENORMALIZE = 7
    HAS_ROUTER = 8
    SCALING = 9
    IN = 10
    OUT = 11
    START = 12
    DTYPE = 13
    PROBE = 14
    ROUTER = 15
    CARRY = 16


def packed_a_shape(rows: int, n_in: int) -> tuple[int, ...]:
    """[A; R] [rows, in] is kept as [rows/4, in/32, 4, 32], padded with zeros.

    Four rows lie interleaved so that the operator reads one stream, whatever the distance between rows of A.
    """
    return -(-rows // ROW_GROUP), -(-n_in // CHUNK), ROW_GROUP, CHUNK


def packed_b_shape(out: int, k: int, dtype: torch.dtype) -> tuple[int, ...]:
    """B [E, out, r] is kept as [out/64, K/depth, 64, depth], K = E*r, padded with zeros.

    Columns of y lie side by side, as the operator's vectors run along them. depth is 2 for bfloat16, whose dot
    instruction multiplies pairs of neighbouring k, and 1 otherwise.
    """
    depth = 2 if dtype is torch.bfloat16 else 1
    return -(-out // PANEL), -(-k // depth), PANEL, depth


def pack_a(a: torch.Tensor, packed: torch.Tensor) -> None:
    """Write [A; R] into `packed`, zeros of `packed_a_shape`."""
    rows, n_in = a.shape
    if rows % ROW_GROUP or n_in % CHUNK:
        a = torch.nn.functional.pad(a, (0, -n_in % CHUNK, 0, -rows % ROW_GROUP))
    packed.copy_(a.view(-1, ROW_GROUP, packed.shape[1], CHUNK).transpose(1, 2))


def pack_b(b: torch.Tensor, packed: torch.Tensor) -> None:
    """Write B into `packed`, zeros of `packed_b_shape`."""
    heads, out, rank = b.shape
    panels, steps, _, depth = packed.shape
    if out % PANEL or rank % depth:
        flat = b.transpose(0, 1).reshape(out, heads * rank)
        padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % depth, 0, -out % PANEL))
        packed.copy_(padded.view(panels, PANEL, steps, depth).transpose(1, 2))
        return
    unit = torch.int32 if depth == 2 else b.dtype  # a pair is moved as one number
    source = b.contiguous().view(unit).view(heads, panels, PANEL, rank // depth)
    packed.view(unit).view(panels, heads, rank // depth, PANEL).copy_(source.permute(1, 0, 3, 2))


class PackedSlots(LayerSlots):
    """Slots of any mix of sizes in main memory; needs the native library, see `build.load`.

    table: [slots, slices, 17] int64, see `TableField`: the addresses of the packed weights and how to read them.
           It keeps its own address for the life of the object; a slot's weights move when it is loaded again.
    """

    def __init__(
        self,
        num_slots: int,
        in_features: int,
        out_slices: Sequence[int],
        capacity: SlotCapacity,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_slots, in_features, out_slices, capacity, dtype, device)
        if not available(dtype):
            raise RuntimeError(
                f"packed slots: the native CPU kernels cannot be used for {dtype}: {build.load().reason}"
            )
        self.table = torch.zeros(num_slots, len(self.out_slices), len(TableField), dtype=torch.int64)
        self._blobs: list[torch.Tensor | None] = [None] * num_slots
        ops = torch.ops.hydra_kernels
        self._linear, self._shrink, self._expand = (
            ops.cpu_linear_.default,
            ops.cpu_shrink.default,
            ops.cpu_expand_.default,
        )

    def _store(self, slot: int, weights: Sequence[HydraWeights | None]) -> None:
        shapes: list[tuple[torch.dtype, tuple[int, ...]]] = []
        for held in filter(None, weights):
            shapes.append((self.dtype, packed_a_shape(held.layout.z_rows, held.in_features)))
            shapes.append((self.dtype, packed_b_shape(held.out_features, held.layout.k, self.dtype)))
            shapes.append((torch.float32, (0,) if held.bias is None else tuple(held.bias.shape)))
        blob, blocks = _blocks(shapes)
        records, start, left = [], 0, iter(blocks)
        for i, part in enumerate(weights):
            if part is None:
                records.append([0] * len(TableField))
            else:
                a, b, bias = next(left), next(left), next(left)
                pack_a(part.stacked_a().to("cpu", self.dtype), a)
                pack_b(part.b.to("cpu", self.dtype), b)
                if part.bias is not None:
                    bias.copy_(part.bias)
                records.append(self._record(part, [block.data_ptr() for block in (a, b, bias)], start, i))
            start += self.out_slices[i]
        self._blobs[slot] = blob
        self.table[slot] = torch.tensor(records)

    def _record(self, weights: HydraWeights, addresses: Sequence[int], start: int, index: int) -> list[int]:
        layout = weights.layout
        a, b, bias = addresses
        record = {
            TableField.A: a,
            TableField.B: b,
            TableField.BIAS: bias if layout.has_bias else 0,
            TableField.RANK: layout.rank,
            TableField.HEADS: layout.heads,
            TableField.SHARED_A: layout.shared_a,
            TableField.TOP_K: layout.top_k,
            TableField.RENORMALIZE: layout.renormalize,
            TableField.HAS_ROUTER: layout.has_router,
            TableField.SCALING: struct.unpack("<I", struct.pack("<f", weights.scaling))[0],
            TableField.IN: weights.in_features,
            TableField.OUT: weights.out_features,
            TableField.START: start,
            TableField.DTYPE: DTYPES[self.dtype],
            TableField.PROBE: 0 if self.probe is None else self.probe.control.data_ptr(),
            TableField.ROUTER: self.first_router + index,
            TableField.CARRY: layout.carry,
        }
        return [int(record[field]) for field in TableField]

    def clear(self, slot: int) -> None:
        self.table[slot] = 0
        self._blobs[slot] = None

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + sum(blob.nbytes for blob in self._blobs if blob is not None)

    def linear_(self, y: torch.Tensor, x: torch.Tensor, meta: StepMetadata) -> None:
        self._check(meta)
        self._linear(y, x, self.table, meta.host, self._carry(meta))

    def shrink(self, x: torch.Tensor, meta: StepMetadata) -> torch.Tensor:
        self._check(meta)
        z: torch.Tensor = self._shrink(x, self.table, meta.host, self.capacity.rows)
        return z

    def expand_(self, y: torch.Tensor, z: torch.Tensor, meta: StepMetadata) -> None:
        self._check(meta)
        self._expand(y, z, self.table, meta.host, self._carry(meta))


def available(dtype: torch.dtype) -> bool:
    """Whether the native operator can serve slots of `dtype`; builds it on the first call."""
    return dtype in DTYPES and build.load().isa is not None


def _blocks(shapes: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One block of bytes, zeros, and a tensor of each dtype and shape in it, each at a multiple of ALIGNMENT."""
    sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in shapes]
    ends = list(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
    blob = _arena.take(ends[-1] if ends else ALIGNMENT)
    starts = [0, *ends[:-1]]
    return blob, [
        blob[start : start + size].view(dtype).view(shape)
        for start, size, (dtype, shape) in zip(starts, sizes, shapes, strict=True)
    ]
