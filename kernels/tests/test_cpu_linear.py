"""The native CPU operator against the reference, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Callable

import hydra_kernels as hk
import pytest
import torch
from cpu_cases import DTYPES, HYDRA, LAYOUTS, Case, isa, make_case, one_thread  # noqa: F401  fixtures
from hydra_kernels import testing

pytestmark = pytest.mark.usefixtures("isa", "one_thread")


def check(case: Case) -> None:
    assert testing.max_error(case.run(), case.expected()) < testing.TOLERANCE[case.x.dtype]


def change_router(case: Case, change: Callable[[torch.Tensor], object]) -> None:
    """Loads slot 0 again with its router changed in place."""
    weights = case.held[0] or []
    for part in weights:
        assert part is not None
        assert part.router is not None
        change(part.router)
    case.slots.load(0, weights)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_sized_layer_matches_reference(dtype: torch.dtype) -> None:
    """SmolLM2-135M's down projection: long sums."""
    check(make_case([HYDRA, HYDRA], [i % 2 for i in range(40)], 1536, (576,), dtype))


def test_bfloat16_is_as_good_as_one_rounding_of_y() -> None:
    """With y = 0 and weights of order one the error is that of rounding h and y, 2^-8 of their sizes."""
    case = make_case([HYDRA], [0] * 64, 576, (192,), torch.bfloat16)
    case.y.zero_()
    expected = case.expected()
    rms = (case.run().double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert rms < 2**-8


def test_float32_gate_is_exact_for_large_logits() -> None:
    """Logits of +-100: the softmax must neither overflow nor lose the smaller heads."""
    case = make_case([hk.Layout(8, 16, has_router=True)], [0] * 9, 64, (48,))
    change_router(case, lambda router: router.mul_(40))
    check(case)


def test_top_k_keeps_the_first_of_equal_heads() -> None:
    """Without router rows all logits are 0: top-1 must be head 0 for every token, as in the reference."""
    case = make_case([hk.Layout(4, 5, top_k=1, has_router=True)], [0] * 5, 32, (24,))
    change_router(case, lambda router: router.zero_())
    check(case)
