"""Slots for the native CPU operator: each adapter at its own size, packed as csrc/kernels_impl.h reads it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum

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


def pack_a(a: torch.Tensor) -> torch.Tensor:
    """[A; R] [rows, in] -> [rows/4, in/32, 4, 32], padded with zeros.

    Four rows lie interleaved so that the operator reads one stream, whatever the distance between rows of A.
    """
    rows, n_in = a.shape
    padded = torch.nn.functional.pad(a, (0, -n_in % CHUNK, 0, -rows % ROW_GROUP))
    return padded.view(-1, ROW_GROUP, padded.shape[1] // CHUNK, CHUNK).transpose(1, 2).contiguous()


def pack_b(b: torch.Tensor) -> torch.Tensor:
    """B [E, out, r] -> [out/64, K/depth, 64, depth], K = E*r, padded with zeros.

    Columns of y lie side by side, as the operator's vectors run along them. depth is 2 for bfloat16, whose dot
    instruction multiplies pairs of neighbouring k, and 1 otherwise.
    """
    heads, out, rank = b.shape
    depth = 2 if b.dtype is torch.bfloat16 else 1
    flat = b.transpose(0, 1).reshape(out, heads * rank)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % depth, 0, -out % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // depth, depth).transpose(1, 2).contiguous()


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
        parts: list[torch.Tensor] = []
        for part in weights:
            if part is not None:
                parts += [pack_a(part.stacked_a().to("cpu", self.dtype)), pack_b(part.b.to("cpu", self.dtype))]
                parts.append(torch.zeros(0) if part.bias is None else part.bias.to("cpu", torch.float32))
        blob, addresses = _join(parts)
        records = torch.zeros(len(self.out_slices), len(TableField), dtype=torch.int64)
        start, used = 0, 0
        for i, part in enumerate(weights):
            if part is not None:
                records[i] = torch.tensor(self._record(part, addresses[used : used + 3], start, i))
                used += 3
            start += self.out_slices[i]
        self._blobs[slot] = blob
        self.table[slot] = records

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

    def _check(self, meta: StepMetadata) -> None:
        """The op finds the parts of the metadata by the number of slots."""
        if meta.max_slots != self.num_slots:
            raise ValueError(f"step metadata: got {meta.max_slots} slots, expected {self.num_slots} as in the layer")


def available(dtype: torch.dtype) -> bool:
    """Whether the native operator can serve slots of `dtype`; builds it on the first call."""
    return dtype in DTYPES and build.load().isa is not None


def _join(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """One block of bytes with all parts, each at a multiple of ALIGNMENT, and the address of each."""
    offsets, end = [], 0
    for part in parts:
        offsets.append(end)
        end += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
    blob = _arena.take(max(end, ALIGNMENT))
    for part, offset in zip(parts, offsets, strict=True):
        blob[offset : offset + part.nbytes] = part.reshape(-1).view(torch.uint8)
    return blob, [blob.data_ptr() + offset for offset in offsets]
