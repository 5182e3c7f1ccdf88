"""Token -> slot segments, computed once per step and shared by every layer of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import torch

# A tile is up to this many tokens of one slot: the unit of work of the GPU kernels. Decode batches have few
# tokens a slot, so small tiles waste least (16 is the smallest M that tensor cores take); prefill wants large
# ones, which read the weights less often. Launchers choose by the number of rows of x.
TILE_SIZES = (16, 64)

# Header of the buffer, int32: tokens in segments, segments, then the number of tiles of each size.
NUM_TOKENS, NUM_SEGMENTS, NUM_TILES, HEADER = 0, 1, 2, 4


def max_tiles(size: int, tokens: int, max_slots: int) -> int:
    """The most tiles of `size` that `tokens` rows over `max_slots` slots can have.

    The worst mix gives every slot one token and the others the rest: each further `size` tokens make one more tile.
    """
    segments = min(tokens, max_slots)
    return segments + (tokens - segments) // size


@lru_cache
def buffer_parts(max_tokens: int, max_slots: int) -> Mapping[str, slice]:
    """Where each part of the buffer of a `StepMetadata` of these sizes lies."""
    sizes = {"header": HEADER, "segment_slot": max_slots, "segment_start": max_slots + 1, "order": max_tokens}
    sizes |= {f"tiles_{size}": 3 * max_tiles(size, max_tokens, max_slots) for size in TILE_SIZES}
    sizes["token_slot"] = max_tokens
    ends = np.cumsum(list(sizes.values())).tolist()
    return MappingProxyType(
        {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
    )


class StepMetadata:
    """Which tokens of the step belong to which slot.

    Tokens are sorted by slot (stable); a *segment* is the run of one slot's tokens in that order. Tokens of
    slot -1 (no adapter) are in no segment. Each segment is also cut into *tiles* of at most `size` tokens, for
    each size in TILE_SIZES, for kernels that want equal units of work.

    All of it lives in one int32 buffer, with the same addresses for the whole life of the object, so that
    CUDA graphs and compiled code may hold on to it. Its parts, one after another:

        header [4]             tokens in segments, segments, tiles of 16, tiles of 64
        segment_slot [S]       S = max_slots
        segment_start [S + 1]  into order
        order [N]              token ids sorted by slot; N = max_tokens
        tiles_16 [M, 3]        slot, start into order, tokens; M = max_tiles(16, N, S)
        tiles_64 [M, 3]        the same, M = max_tiles(64, N, S)
        token_slot [N]         slot of each row, -1 for none and beyond the step's rows

    host:   the buffer on the CPU: what CPU operators read, and where launchers look for "nothing to do".
    device: its copy on the accelerator, updated without synchronisation; `host` itself on a CPU.
    carry:  [N, heads] float32 on the device, for logits that go from one layer of the step to another (see `Carry`);
            None when `heads` is 0. What a step leaves in it means nothing to the next.
    """

    def __init__(self, max_tokens: int, max_slots: int, device: torch.device | str = "cpu", heads: int = 0) -> None:
        self.max_tokens, self.max_slots = max_tokens, max_slots
        self.carry = torch.zeros(max_tokens, heads, dtype=torch.float32, device=device) if heads else None
        self.parts = buffer_parts(max_tokens, max_slots)
        self.host = torch.zeros(self.parts["token_slot"].stop, dtype=torch.int32)
        self.part("token_slot").fill_(-1)
        self.device = self.host if torch.device(device).type == "cpu" else self.host.to(device)
        self._np = self.host.numpy()

    def max_tiles(self, size: int, tokens: int | None = None) -> int:
        """The most tiles of `size` that a step of `tokens` rows (default: max_tokens) can have."""
        return max_tiles(size, self.max_tokens if tokens is None else tokens, self.max_slots)

    def part(self, name: str, *, device: bool = False) -> torch.Tensor:
        """A view of one part of the buffer, on the host or on the device."""
        return (self.device if device else self.host)[self.parts[name]]

    @property
    def active(self) -> bool:
        """Whether any token of this step has an adapter."""
        return bool(self._np[NUM_SEGMENTS])

    def update(self, token_slots: Sequence[int] | np.ndarray) -> None:
        """Set the slots of this step's tokens, -1 for none. [T], T <= max_tokens, slots < max_slots.

        Raises ValueError when there are more tokens or slots than the object was made for.
        """
        slots = np.asarray(token_slots, dtype=np.int32)
        if slots.size > self.max_tokens:
            raise ValueError(f"step metadata: got {slots.size} tokens, expected at most {self.max_tokens}")
        rows = np.flatnonzero(slots >= 0)
        if rows.size:
            self._write_segments(slots[rows], rows)
        else:
            self._np[:HEADER] = 0
        self._write("token_slot", slots)
        self._np[self.parts["token_slot"]][slots.size :] = -1
        if self.device is not self.host:
            # A fresh pinned copy: the caching allocator keeps it until the copy is done, so that the next
            # step may write `host` while this one is still in flight.
            self.device.copy_(self.host.pin_memory(), non_blocking=True)

    def _write_segments(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """Everything but `token_slot`, from the rows that have a slot."""
        counts = np.bincount(slots)
        if counts.size > self.max_slots:
            raise ValueError(f"step metadata: got slot {counts.size - 1}, expected at most {self.max_slots - 1}")
        ids = np.flatnonzero(counts)
        counts = counts[ids]
        starts = np.concatenate([[0], np.cumsum(counts)])
        self._write("segment_slot", ids)
        self._write("segment_start", starts)
        # A stable sort of 16-bit keys is a radix sort.
        key = slots.astype(np.int16 if self.max_slots < 1 << 15 else np.int32)
        self._write("order", rows[np.argsort(key, kind="stable")])
        header = [rows.size, ids.size]
        for size in TILE_SIZES:
            tiles = _tiles(ids, starts, counts, size)
            header.append(len(tiles))
            self._write(f"tiles_{size}", tiles.reshape(-1))
        self._write("header", np.array(header))

    def _write(self, name: str, values: np.ndarray) -> None:
        start = self.parts[name].start
        self._np[start : start + values.size] = values


def _tiles(ids: np.ndarray, starts: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    """[tiles, 3]: slot, start into order, tokens, of all segments cut into tiles of at most `size`."""
    per_segment = -(-counts // size)
    segment = np.repeat(np.arange(ids.size), per_segment)
    offset = (np.arange(segment.size) - np.repeat(np.cumsum(per_segment) - per_segment, per_segment)) * size
    return np.stack([ids[segment], starts[segment] + offset, np.minimum(size, counts[segment] - offset)], axis=1)
