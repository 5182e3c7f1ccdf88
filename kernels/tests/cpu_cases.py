"""What the tests of the native CPU operator share: fixtures, and a layer with loaded slots and a step's input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import hydra_kernels as hk
import pytest
import torch
from hydra_kernels import reference, testing
from hydra_kernels.ops import build, cpu

ISAS = ("avx512bf16", "avx512", "avx2", "portable")
DTYPES = list(testing.TOLERANCE)

HYDRA = hk.Layout(8, 4, has_router=True)
LAYOUTS = [
    HYDRA,
    hk.Layout(3, 1),
    hk.Layout(16, 3, has_router=True, has_bias=True),
    hk.Layout(4, 8, shared_a=False, top_k=2, has_router=True),
    hk.Layout(5, 3, top_k=1, renormalize=False, has_router=True),
    hk.Layout(2, 3),
    hk.Layout(1, 16, has_router=True, top_k=3, has_bias=True),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on one instruction set."""
    native = build.load()
    assert native.isa is not None, native.reason
    try:
        torch.ops.hydra_kernels.cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    torch.ops.hydra_kernels.cpu_isa("")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small work on a busy machine is quickest on one thread; threads are varied where they are the subject."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """A layer with loaded slots, and a step's input."""

    slots: cpu.PackedSlots
    held: list[list[hk.HydraWeights | None] | None]
    meta: hk.StepMetadata
    ids: list[int]
    x: torch.Tensor
    y: torch.Tensor

    def expected(self) -> torch.Tensor:
        """The reference's answer in float64."""
        return reference.linear(self.y, self.x, self.ids, self.held, self.slots.out_slices, torch.float64)

    def run(self) -> torch.Tensor:
        """The operator's answer."""
        y = self.y.clone()
        hk.linear_(y, self.x, self.slots, self.meta)
        return y


def make_case(
    layouts: Sequence[hk.Layout | None],
    ids: Sequence[int],
    n_in: int = 50,
    out: Sequence[int] = (40, 24, 24),
    dtype: torch.dtype = torch.float32,
) -> Case:
    """A slot for each layout (None: empty); in a merged layer most slots leave one slice alone."""
    capacity = testing.capacity_for([layout for layout in layouts if layout is not None])
    slots = cpu.PackedSlots(len(layouts), n_in, out, capacity, dtype)
    held: list[list[hk.HydraWeights | None] | None] = []
    for i, layout in enumerate(layouts):
        if layout is None:
            held.append(None)
            continue
        parts = [testing.random_weights(n_in, o, layout, dtype, 10 * i + j) for j, o in enumerate(out)]
        skipped = i % (len(out) + 1) if len(out) > 1 else None
        weights = [None if j == skipped else part for j, part in enumerate(parts)]
        slots.load(i, weights)
        held.append(weights)
    meta = hk.StepMetadata(max(len(ids), 1), len(layouts))
    meta.update(ids)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(len(ids), n_in, generator=g).to(dtype)
    y = torch.randn(len(ids), sum(out), generator=g).to(dtype)
    return Case(slots, held, meta, list(ids), x, y)
