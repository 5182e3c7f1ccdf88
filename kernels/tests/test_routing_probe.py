"""What a probe records of the gate equals the reference's routing weights, and recording changes no result."""

from __future__ import annotations

import hydra_kernels as hk
import numpy as np
import pytest
import torch
from cpu_cases import LAYOUTS, Case, isa, make_case  # noqa: F401  fixture
from hydra_kernels import reference, testing
from hydra_kernels.probe import token_addresses

TOLERANCE = 1e-6  # float32 weights of at most 1, logits of order one


def probed_case(
    layouts: list[hk.Layout], ids: list[int], dtype: torch.dtype = torch.float32
) -> tuple[Case, hk.RoutingProbe]:
    """A merged layer of three slices whose slots were loaded with a probe: routers 2, 3 and 4 of six."""
    case = make_case(layouts, ids, dtype=dtype)
    probe = hk.RoutingProbe(len(layouts), 6, case.slots.capacity.heads, len(ids) + 3)
    case.slots.probe_with(probe, 2)
    for slot, parts in enumerate(case.held):
        assert parts is not None
        case.slots.load(slot, parts)
    return case, probe


def expected_weights(case: Case, probe: hk.RoutingProbe) -> torch.Tensor:
    """[T, routers, heads] float64 of the reference; NaN where there is no router."""
    result = torch.full((len(case.ids), probe.routers, probe.heads), float("nan"), dtype=torch.float64)
    for token, slot in enumerate(case.ids):
        for i, part in enumerate(case.held[slot] or [] if slot >= 0 else []):
            if part is not None and part.layout.has_router:
                w = reference.routing_weights(case.x[token : token + 1], part, torch.float64)
                result[token, 2 + i, : part.layout.heads] = w[0]
    return result


def entropy(w: torch.Tensor) -> torch.Tensor:
    return -(w * w.clamp_min(1e-300).log()).nan_to_num().sum(-1)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("mix", testing.MIXES)
def test_traces_hold_every_routing_weight(mix: str) -> None:
    case, probe = probed_case(LAYOUTS, testing.token_slots(mix, 61, len(LAYOUTS)).tolist())
    trace = probe.trace(61)
    probe.set(count=False, traces=token_addresses(trace, range(61)))
    case.run()
    torch.testing.assert_close(trace.double(), expected_weights(case, probe), rtol=0, atol=TOLERANCE, equal_nan=True)
    assert probe.sums.count_nonzero() == 0


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("mix", ["identical", "zipf", "partial"])
def test_sums_are_those_of_weights_and_entropies(mix: str) -> None:
    ids = testing.token_slots(mix, 130, len(LAYOUTS)).tolist()
    case, probe = probed_case(LAYOUTS, ids)
    probe.set(count=True)
    case.run()
    case.run()
    w = expected_weights(case, probe)
    expected = torch.zeros_like(probe.sums)
    for slot in range(len(LAYOUTS)):
        of_slot = w[[token for token, s in enumerate(ids) if s == slot]]
        expected[slot, :, :-1] = 2 * of_slot.nan_to_num().sum(0)
        expected[slot, :, -1] = 2 * entropy(of_slot).sum(0)
    torch.testing.assert_close(probe.sums, expected, rtol=1e-6, atol=1e-5)


def test_threads_share_one_sum() -> None:
    """A prompt long enough that several threads record tokens of the same slot."""
    before = torch.get_num_threads()
    layout = hk.Layout(16, 4, has_router=True)
    ids = [0] * 600
    case = make_case([layout], ids, 576, (1536,))
    probe = hk.RoutingProbe(1, 1, 4, len(ids))
    case.slots.probe_with(probe, 0)
    case.slots.load(0, case.held[0] or [])
    probe.set(count=True)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            probe.sums.zero_()
            case.run()
            assert probe.sums[0, 0, :4].sum().item() == pytest.approx(600, rel=1e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recording_changes_no_bit_of_the_result(dtype: torch.dtype) -> None:
    ids = testing.token_slots("zipf", 70, len(LAYOUTS)).tolist()
    case, probe = probed_case(LAYOUTS, ids, dtype)
    quiet = case.run()
    trace = probe.trace(70)
    probe.set(count=True, traces=token_addresses(trace, range(70)))
    assert torch.equal(case.run(), quiet)


def test_only_the_asked_tokens_are_traced_where_they_belong() -> None:
    """A chunk of a prompt, computed after others: its tokens go to their places, all other tokens nowhere."""
    ids = [0, 1, 1, 1, 0, -1]
    case, probe = probed_case([hk.Layout(4, 3, has_router=True)] * 2, ids)
    trace = probe.trace(10)
    traces = np.zeros(len(ids), dtype=np.int64)
    traces[1:4] = token_addresses(trace, [5, 6, 7])
    probe.set(count=False, traces=traces)
    case.run()
    written = ~trace.isnan().all(dim=2).all(dim=1)
    assert written.tolist() == [i in (5, 6, 7) for i in range(10)]
    expected = expected_weights(case, probe)[1:4]
    torch.testing.assert_close(trace[5:8].double(), expected, rtol=0, atol=TOLERANCE, equal_nan=True)


def test_nothing_is_recorded_when_it_is_off() -> None:
    case, probe = probed_case(LAYOUTS, [0, 2, 3])
    trace = probe.trace(3)
    probe.set(count=True, traces=token_addresses(trace, range(3)))
    probe.set(count=False)
    assert not probe.active
    case.run()
    assert probe.sums.count_nonzero() == 0
    assert trace.isnan().all()


def test_positions_outside_the_buffer_have_no_address() -> None:
    probe = hk.RoutingProbe(1, 2, 3, 4)
    trace = probe.trace(2)
    addresses = token_addresses(trace, [-1, 0, 1, 2])
    assert addresses.tolist() == [0, trace.data_ptr(), trace.data_ptr() + 2 * 3 * 4, 0]


def test_a_probe_that_is_too_small_is_refused() -> None:
    slots = make_case([hk.Layout(4, 3, has_router=True)], [0]).slots
    for probe, first in ((hk.RoutingProbe(1, 3, 2, 1), 0), (hk.RoutingProbe(1, 3, 3, 1), 1)):
        with pytest.raises(ValueError, match="expected at least"):
            slots.probe_with(probe, first)
    with pytest.raises(ValueError, match="at most 1"):
        hk.RoutingProbe(1, 3, 3, 1).set(count=False, traces=np.zeros(2, dtype=np.int64))
