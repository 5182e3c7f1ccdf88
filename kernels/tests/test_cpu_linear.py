"""The native CPU operator against the reference, on every instruction set that this machine has."""

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

pytestmark = pytest.mark.usefixtures("isa", "one_thread")

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
    assert build.load().isa is not None, build.load().reason
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
        return reference.linear(self.y, self.x, self.ids, self.held, self.slots.out_slices, torch.float64)

    def run(self) -> torch.Tensor:
        y = self.y.clone()
        hk.linear_(y, self.x, self.slots, self.meta)
        return y


def make_case(
    layouts: Sequence[hk.Layout | None],
    ids: Sequence[int],
    n_in: int = 50,
    out: Sequence[int] = (40, 24, 24),
    dtype: torch.dtype = torch.float32,
    skip: bool = True,
) -> Case:
    """A slot for each layout (None: empty), each with one slice that it does not adapt when `skip`."""
    known = [layout for layout in layouts if layout is not None]
    slots = cpu.PackedSlots(len(layouts), n_in, out, testing.capacity_for(known), dtype)
    held: list[list[hk.HydraWeights | None] | None] = []
    for i, layout in enumerate(layouts):
        if layout is None:
            held.append(None)
            continue
        parts = [testing.random_weights(n_in, o, layout, dtype, 10 * i + j) for j, o in enumerate(out)]
        held.append([None if skip and len(out) > 1 and j == i % (len(out) + 1) else p for j, p in enumerate(parts)])
        slots.load(i, held[-1])
    meta = hk.StepMetadata(max(len(ids), 1), len(layouts))
    meta.update(ids)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(len(ids), n_in, generator=g).to(dtype)
    y = torch.randn(len(ids), sum(out), generator=g).to(dtype)
    return Case(slots, held, meta, list(ids), x, y)


def check(case: Case) -> None:
    assert testing.max_error(case.run(), case.expected()) < testing.TOLERANCE[case.x.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", testing.MIXES)
def test_mixes_match_reference(mix: str, dtype: torch.dtype) -> None:
    check(make_case(LAYOUTS, testing.token_slots(mix, 61, len(LAYOUTS)).tolist(), dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_in", "out"), [(1, (1,)), (15, (17,)), (33, (1, 63)), (64, (64, 128)), (130, (65, 1, 200))])
def test_odd_sizes_match_reference(n_in: int, out: tuple[int, ...], dtype: torch.dtype) -> None:
    check(make_case(LAYOUTS, [0, 3, 1, 4, 2, 6, 5, -1, 0, 0, 0], n_in, out, dtype))


@pytest.mark.parametrize("heads", [1, 2, 5, 16])
@pytest.mark.parametrize("rank", [1, 2, 7, 31, 128])
def test_ranks_and_heads_match_reference(rank: int, heads: int) -> None:
    layouts = [
        hk.Layout(rank, heads, has_router=heads > 1),
        hk.Layout(rank, heads, shared_a=False, has_router=True, has_bias=True, top_k=(heads + 1) // 2),
    ]
    for dtype in DTYPES:
        check(make_case(layouts, [0, 1, 1, 0, 0, -1, 1], 47, (70,), dtype))


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 7, 12, 47, 48, 49, 97, 131])
def test_any_number_of_tokens_matches_reference(tokens: int) -> None:
    for dtype in DTYPES:
        check(make_case([HYDRA], [0] * tokens, 96, (64, 32), dtype))


def test_model_sized_layer_matches_reference() -> None:
    """SmolLM2-135M's down projection: long sums, and work enough for every thread."""
    check(make_case([HYDRA, HYDRA], [i % 2 for i in range(40)], 1536, (576,), torch.bfloat16))
    check(make_case([HYDRA, HYDRA], [i % 2 for i in range(40)], 1536, (576,), torch.float32))
