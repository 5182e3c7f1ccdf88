"""PackedSlots: loading and clearing, what the ops refuse, and how torch.compile and opcheck see them."""

from __future__ import annotations

from dataclasses import replace

import hydra_kernels as hk
import pytest
import torch
from cpu_cases import DTYPES, HYDRA, LAYOUTS, make_case, one_thread  # noqa: F401  fixtures
from hydra_kernels import testing
from hydra_kernels.ops import cpu

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = torch.ops.hydra_kernels


def test_dispatch_chooses_packed_slots_on_a_cpu() -> None:
    capacity = testing.capacity_for([HYDRA])
    assert isinstance(hk.make_slots(2, 8, (8,), capacity, torch.bfloat16, "cpu"), cpu.PackedSlots)
    assert isinstance(hk.make_slots(2, 8, (8,), capacity, torch.float64, "cpu"), hk.slots.StackedSlots)


def test_clear_and_reload() -> None:
    case = make_case([HYDRA, HYDRA], [0, 1, 0], 50, (40,))
    case.slots.clear(0)
    case.held[0] = None
    got = case.run()
    assert torch.equal(got[0], case.y[0])
    assert testing.max_error(got, case.expected()) < 2e-5
    bigger = hk.Layout(2, 16, has_router=True)
    with pytest.raises(ValueError, match="got 18 rows"):
        case.slots.load(1, [testing.random_weights(50, 40, bigger, torch.float32, 5)])
    assert torch.equal(case.run(), case.y)  # a load that fails leaves the slot empty
    case.held = [[testing.random_weights(50, 40, hk.Layout(7, 4), torch.float32, seed)] for seed in (6, 7)]
    for slot, weights in enumerate(case.held):
        case.slots.load(slot, weights or [])
    assert testing.max_error(case.run(), case.expected()) < 2e-5


def test_slots_hold_their_adapters_true_size() -> None:
    """No padding to the capacity, and nothing once the slot is cleared."""
    capacity = hk.SlotCapacity(rows=640, k=2048, heads=16)
    slots = cpu.PackedSlots(4, 576, (576,), capacity, torch.bfloat16)
    empty = slots.nbytes
    weights = testing.random_weights(576, 576, HYDRA, torch.bfloat16)
    slots.load(2, [weights])
    assert weights.nbytes <= slots.nbytes - empty <= weights.nbytes + 256
    slots.clear(2)
    assert slots.nbytes == empty


def test_weights_of_another_dtype_are_converted() -> None:
    case = make_case([HYDRA], [0, 0], 50, (40,), torch.bfloat16)
    before = case.run()
    case.slots.load(0, [None if part is None else part.to(torch.float32) for part in case.held[0] or []])
    assert torch.equal(case.run(), before)


def test_the_table_keeps_its_address() -> None:
    """Compiled code holds on to it."""
    case = make_case([HYDRA], [0], 50, (40,))
    address = case.slots.table.data_ptr()
    case.slots.load(0, case.held[0] or [])
    case.slots.clear(0)
    assert case.slots.table.data_ptr() == address


def test_one_step_metadata_serves_only_layers_with_its_slots() -> None:
    case = make_case([HYDRA], [0], 50, (40,))
    other = hk.StepMetadata(4, 2)
    other.update([0])
    with pytest.raises(ValueError, match="got 2 slots, expected 1"):
        hk.linear_(case.y, case.x, case.slots, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"x": c.x[:, :-1]}, "x: got 49 features, expected 50"),
        (lambda c: {"x": c.x.T.contiguous().T}, "x: got .* expected two dimensions, the last one contiguous"),
        (lambda c: {"x": c.x[:-1], "y": c.y[:-1]}, "meta: got token ids 0 to 2, expected 0 to 1"),
        (lambda c: {"x": c.x[:-1]}, "y: got .* expected .* 2 rows of x"),
        (lambda c: {"y": c.y[:, :-1]}, "y: got 39 columns, expected 40"),
        (lambda c: {"y": c.y.half()}, "y: got Half"),
        (lambda c: {"x": c.x.half(), "y": c.y.half()}, "another dtype than the slots'"),
        (lambda c: {"x": c.x.double(), "y": c.y.double()}, "got Double, expected float32, float16 or bfloat16"),
        (lambda c: {"table": c.slots.table[:, :, :-1]}, "table: got"),
        (lambda c: {"meta": c.meta.host[:4]}, "meta: got"),
        (lambda c: {"meta": c.meta.host.long()}, "meta: got"),
    ],
)
def test_linear_refuses_what_does_not_fit(change: object, message: str) -> None:
    case = make_case([HYDRA], [0, 0, 0], 50, (40,))
    arguments = {"y": case.y, "x": case.x, "table": case.slots.table, "meta": case.meta.host}
    assert callable(change)
    with pytest.raises(RuntimeError, match=message):
        OPS.cpu_linear_(**(arguments | change(case)))


def test_shrink_and_expand_refuse_what_does_not_fit() -> None:
    case = make_case([HYDRA], [0, 0, 0], 50, (40,))
    with pytest.raises(RuntimeError, match="rows: got 11, expected at least 12"):
        OPS.cpu_shrink(case.x, case.slots.table, case.meta.host, 11)
    for z in (torch.zeros(1, 3, 11), torch.zeros(2, 3, 12), torch.zeros(1, 2, 12), torch.zeros(1, 3, 12).double()):
        with pytest.raises(RuntimeError, match="z: got"):
            OPS.cpu_expand_(case.y, z, case.slots.table, case.meta.host)


def test_no_tokens() -> None:
    case = make_case([HYDRA], [], 50, (40,))
    assert case.run().shape == (0, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids", [[-1, -1], [0, 2, 1, -1, 2]], ids=["base", "mixed"])
def test_opcheck(ids: list[int], dtype: torch.dtype) -> None:
    case = make_case([replace(HYDRA, carry=hk.Carry.GIVES), *LAYOUTS[1:3]], ids, 50, (40, 24), dtype)
    table, meta, carry = case.slots.table, case.meta.host, torch.zeros(len(ids), 4)
    torch.library.opcheck(OPS.cpu_linear_.default, (case.y, case.x, table, meta, carry))
    torch.library.opcheck(OPS.cpu_shrink.default, (case.x, table, meta, 20))
    torch.library.opcheck(OPS.cpu_expand_.default, (case.y, torch.randn(2, len(ids), 20), table, meta, carry))


def test_compiled_code_follows_the_metadata_and_the_slots() -> None:
    """One graph without breaks; later steps and loads reach it through the same tensors."""
    case = make_case([HYDRA, None], [0, -1, 0], 50, (40,))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def layer(x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        y = base * 1
        hk.linear_(y, x, case.slots, case.meta)
        return y

    def check() -> None:
        with torch.inference_mode():
            assert testing.max_error(layer(case.x, case.y), case.expected()) < 2e-5

    check()
    case.ids = [1, 0, 1]
    case.held[1] = [testing.random_weights(50, 40, hk.Layout(5, 2, has_router=True), torch.float32, 3)]
    case.meta.update(case.ids)
    case.slots.load(1, case.held[1])
    check()
