"""What a row of the native CPU operator's result may depend on: its own x, y and adapter, and nothing else."""

from __future__ import annotations

import hydra_kernels as hk
import pytest
import torch
from cpu_cases import DTYPES, HYDRA, LAYOUTS, isa, make_case, one_thread  # noqa: F401  fixtures
from hydra_kernels import testing

pytestmark = pytest.mark.usefixtures("isa", "one_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_never_change_a_row(dtype: torch.dtype) -> None:
    """Every row of a mixed batch equals, bitwise, the same row computed alone and within its first rows."""
    ids = testing.token_slots("zipf", 70, len(LAYOUTS)).tolist()
    case = make_case(LAYOUTS, ids, 66, (70, 24), dtype)
    together = case.run()
    for count in (1, 2, 7, 50):
        for first in range(0, 70 - count + 1, count):
            rows = slice(first, first + count)
            alone = case.y[rows].clone()
            case.meta.update(ids[rows])
            hk.linear_(alone, case.x[rows], case.slots, case.meta)
            assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_never_change_a_row(dtype: torch.dtype) -> None:
    ids = testing.token_slots("skewed", 140, len(LAYOUTS)).tolist()
    case = make_case(LAYOUTS, ids, 200, (260, 60), dtype)
    alone = case.run()
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(case.run(), alone)
    single = make_case([HYDRA], [0], 2048, (4096,), dtype)  # one token: threads share its rows and columns
    torch.set_num_threads(1)
    alone = single.run()
    torch.set_num_threads(3)
    assert torch.equal(single.run(), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_repeatable(dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    case = make_case(LAYOUTS, testing.token_slots("uniform", 100, len(LAYOUTS)).tolist(), 200, (260, 60), dtype)
    first = case.run()
    assert all(torch.equal(case.run(), first) for _ in range(5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_slices_without_adapter_stay_untouched(dtype: torch.dtype) -> None:
    """NaN in y where nothing may be written stays, bit by bit; elsewhere the result has none."""
    ids = [0, -1, 1, 2, -1, 0, 3]
    case = make_case([*LAYOUTS[:3], None], ids, 50, (40, 24, 24), dtype)
    owned = torch.zeros_like(case.y, dtype=torch.bool)
    for row, slot in enumerate(ids):
        for part, columns in zip(case.held[slot] or [], (slice(0, 40), slice(40, 64), slice(64, 88)), strict=False):
            owned[row, columns] = slot >= 0 and part is not None
    case.y[~owned] = torch.nan
    got = case.run()
    assert not got[owned].isnan().any()
    assert torch.equal(got.view(torch.uint8)[~owned.repeat_interleave(dtype.itemsize, 1)],
                       case.y.view(torch.uint8)[~owned.repeat_interleave(dtype.itemsize, 1)])  # fmt: skip
    assert not torch.equal(got[owned], case.y[owned])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_reaches_its_own_row_only(dtype: torch.dtype) -> None:
    ids = [0, 1, 0, 0, 2, 0, 0, 0, -1, 0]
    case = make_case(LAYOUTS[:3], ids, 45, (40,), dtype)
    clean = case.run()
    case.x[3, 44] = torch.nan
    case.x[8] = torch.nan  # the base model's own token
    got = case.run()
    others = [i for i in range(10) if i != 3]
    assert got[3].isnan().all()
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beyond_x_and_y_is_read_or_written(dtype: torch.dtype) -> None:
    """x and y are the middle of wider tensors full of NaN: neither may leak in, nor may the rest of y change."""
    case = make_case(LAYOUTS, list(range(len(LAYOUTS))), 45, (37, 9), dtype)
    expected = case.run()
    wide_x = testing.poison(torch.empty(len(LAYOUTS) + 2, 45 + 6, dtype=dtype))
    wide_y = testing.poison(torch.empty(len(LAYOUTS) + 2, 46 + 6, dtype=dtype))
    wide_x[1:-1, 3:-3], wide_y[1:-1, 3:-3] = case.x, case.y
    hk.linear_(wide_y[1:-1, 3:-3], wide_x[1:-1, 3:-3], case.slots, case.meta)
    assert torch.equal(wide_y[1:-1, 3:-3], expected)
    wide_y[1:-1, 3:-3] = torch.nan
    assert wide_y.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shrink_then_expand_equals_linear(dtype: torch.dtype) -> None:
    """What row-parallel layers do, with any row stride of z; z is 0 where there is nothing."""
    ids = testing.token_slots("partial", 33, len(LAYOUTS)).tolist()
    case = make_case(LAYOUTS, ids, 70, (40, 70), dtype)
    z = hk.shrink(case.x, case.slots, case.meta)
    assert z.shape == (2, 33, case.slots.capacity.rows)
    assert z.dtype is torch.float32
    for row, slot in enumerate(ids):
        for i, part in enumerate(case.held[slot] or [] if slot >= 0 else [None, None]):
            rows = 0 if part is None else part.layout.z_rows
            assert not z[i, row, rows:].any()
            if part is not None:
                expected = part.stacked_a().double() @ case.x[row].double()
                assert testing.max_error(z[i, row, :rows], expected) < 2e-5
    wide = testing.poison(torch.empty(2, 40, z.shape[2] + 5))
    wide[:, :33, :-5] = z
    for given in (z, wide[:, :33, :-5]):
        y = case.y.clone()
        hk.expand_(y, given, case.slots, case.meta)
        assert torch.equal(y, case.run())
