"""What one adapter holds for one linear layer, and the small record that says how its gate works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch


class LayoutField(IntEnum):
    """Columns of a packed layout record (int32), the form in which kernels read a `Layout`."""

    RANK = 0
    HEADS = 1
    SHARED_A = 2
    TOP_K = 3
    RENORMALIZE = 4
    HAS_ROUTER = 5
    HAS_BIAS = 6
    CARRY = 7


LAYOUT_FIELDS = len(LayoutField)


class Carry(IntEnum):
    """Whether a layer's routing is another layer's too, for routers that several layers of a block share.

    NONE:  no.
    GIVES: it leaves its router's logits, bias included, for the layers that come after it in the same step.
    TAKES: it has no router, and takes the logits that the last GIVES layer before it left for the same token.
    """

    NONE = 0
    GIVES = 1
    TAKES = 2


@dataclass(frozen=True, slots=True)
class Layout:
    """How the packed rows and columns of one layer of one adapter are to be read.

    rank:        r, rows of each A.
    heads:       E, number of B matrices. 1 for plain LoRA.
    shared_a:    True: one A [r, in] serves all heads (HydraLoRA). False: A is [E*r, in], head i owns
                 rows i*r .. (i+1)*r (LoRAMoE).
    top_k:       0: all heads. k > 0: only the k largest routing weights count (the first wins a tie).
    renormalize: with top_k, whether the kept weights are scaled to sum to one.
    has_router:  False only for one head (weight 1), for a uniform mixture (weight 1/E), or with `Carry.TAKES`.
    has_bias:    whether a bias [E] is added to the router's logits.
    carry:       whether the logits go to, or come from, another layer.

    Raises ValueError for sizes that cannot exist.
    """

    rank: int
    heads: int = 1
    shared_a: bool = True
    top_k: int = 0
    renormalize: bool = True
    has_router: bool = False
    has_bias: bool = False
    carry: Carry = Carry.NONE

    def __post_init__(self) -> None:
        if self.rank < 1 or self.heads < 1:
            raise ValueError(f"layout: got rank={self.rank}, heads={self.heads}; both must be at least 1")
        if not 0 <= self.top_k <= self.heads:
            raise ValueError(f"layout: got top_k={self.top_k}; expected 0 (all heads) to {self.heads}")
        if self.has_bias and not self.has_router:
            raise ValueError("layout: got a router bias without a router; give the router or drop the bias")
        if (self.carry is Carry.GIVES and not self.has_router) or (self.carry is Carry.TAKES and self.has_router):
            raise ValueError(f"layout: got {self.carry!r} with has_router={self.has_router}; who gives has one")

    @classmethod
    def of_record(cls, record: Sequence[int]) -> Layout:
        """The layout with this `record`, whose rank is not 0."""
        rank, heads, shared_a, top_k, renormalize, has_router, has_bias, carry = record
        flags = bool(renormalize), bool(has_router), bool(has_bias)
        return cls(rank, heads, bool(shared_a), top_k, *flags, Carry(carry))

    @property
    def routed(self) -> bool:
        """Whether the weights come from a router's logits, its own or another layer's."""
        return self.has_router or self.carry is Carry.TAKES

    @property
    def a_rows(self) -> int:
        """Rows of A: r when it is shared, E*r otherwise."""
        return self.rank if self.shared_a else self.rank * self.heads

    @property
    def z_rows(self) -> int:
        """Rows of [A; R], the length of z for one token."""
        return self.a_rows + (self.heads if self.has_router else 0)

    @property
    def k(self) -> int:
        """E*r, the inner size of the expand product."""
        return self.rank * self.heads

    def record(self) -> list[int]:
        """The int32 record, in the order of `LayoutField`."""
        return [
            self.rank,
            self.heads,
            int(self.shared_a),
            self.top_k,
            int(self.renormalize),
            int(self.has_router),
            int(self.has_bias),
            int(self.carry),
        ]


NO_ADAPTER = [0] * LAYOUT_FIELDS  # rank 0: this slot does not touch this slice


@dataclass(frozen=True, slots=True)
class HydraWeights:
    """The weights of one adapter for one linear layer (one slice of a merged layer).

    a:       [a_rows, in], see `Layout.shared_a`.
    b:       [E, out, r]. Not scaled.
    router:  [E, in] or None.
    bias:    [E] or None, added to the router's logits.
    scaling: s, multiplies the whole delta (alpha / r, or alpha / sqrt(r) for rsLoRA).

    Raises ValueError when shapes disagree with the layout.
    """

    a: torch.Tensor
    b: torch.Tensor
    layout: Layout
    router: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scaling: float = 1.0

    def __post_init__(self) -> None:
        lay = self.layout
        expected = {
            "a": (self.a, (lay.a_rows, self.in_features)),
            "b": (self.b, (lay.heads, self.out_features, lay.rank)),
            "router": (self.router, (lay.heads, self.in_features) if lay.has_router else None),
            "bias": (self.bias, (lay.heads,) if lay.has_bias else None),
        }
        for name, (tensor, shape) in expected.items():
            got = None if tensor is None else tuple(tensor.shape)
            if got != shape:
                raise ValueError(f"{name}: got shape {got}, expected {shape} for {lay}")

    @property
    def in_features(self) -> int:
        return self.a.shape[-1]

    @property
    def out_features(self) -> int:
        return self.b.shape[-2]

    @property
    def nbytes(self) -> int:
        tensors = (self.a, self.b, self.router, self.bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def stacked_a(self) -> torch.Tensor:
        """[A; R], [z_rows, in]: what the shrink step multiplies x by."""
        return self.a if self.router is None else torch.cat([self.a, self.router.to(self.a.dtype)])

    def flat_b(self) -> torch.Tensor:
        """[out, E*r], column e*r + j holds s * B_e[:, j]: what the expand step multiplies h by."""
        flat = self.b.transpose(0, 1).reshape(self.out_features, self.layout.k)
        return flat * self.scaling if self.scaling != 1.0 else flat

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> HydraWeights:
        """The same weights in another dtype or on another device. The bias stays in float32."""
        return replace(
            self,
            a=self.a.to(device=device, dtype=dtype),
            b=self.b.to(device=device, dtype=dtype),
            router=None if self.router is None else self.router.to(device=device, dtype=dtype),
            bias=None if self.bias is None else self.bias.to(device=device, dtype=torch.float32),
        )

    def shard(self, *, columns: slice | None = None, rows: slice | None = None) -> HydraWeights:
        """A tensor-parallel part: `columns` of [A; R] (row-parallel layers), `rows` of B."""
        cut = slice(None) if columns is None else columns
        return replace(
            self,
            a=self.a[:, cut],
            router=None if self.router is None else self.router[:, cut],
            b=self.b if rows is None else self.b[:, rows],
        )
