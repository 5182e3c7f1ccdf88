"""What stacked slots tell a routing probe: Triton's expand, and on any machine the grouped torch path."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hydra_kernels import RoutingProbe, reference, testing
from hydra_kernels.probe import token_addresses
from triton_cases import DEVICE, IN, INTERPRETED, LAYOUTS, OUT, TOKENS, Layer, make_layer, needs_triton, rows

TOLERANCE = 1e-6  # float32 weights of at most 1, logits of order one
FIRST_ROUTER = 2

Run = Callable[[Layer, torch.Tensor, list[int]], torch.Tensor]


def run_triton(layer: Layer, x: torch.Tensor, ids: list[int]) -> torch.Tensor:
    y = torch.zeros(len(ids), sum(OUT), device=DEVICE)
    layer.linear_(y, x, layer.step(ids))
    return y


def run_grouped(layer: Layer, x: torch.Tensor, ids: list[int]) -> torch.Tensor:
    y = torch.zeros(len(ids), sum(OUT))
    layer.slots.linear_(y, x, layer.step(ids))
    return y


PATHS = [
    pytest.param(run_triton, marks=needs_triton),
    pytest.param(
        run_grouped,
        marks=pytest.mark.skipif(
            INTERPRETED or DEVICE != "cpu", reason="once is enough, on the CPU and in one process"
        ),
    ),
]


def make(ids: list[int]) -> tuple[Layer, RoutingProbe, torch.Tensor]:
    layer = make_layer(LAYOUTS, torch.float32)
    routers, heads = FIRST_ROUTER + len(OUT) + 1, layer.slots.capacity.heads + 1
    probe = RoutingProbe(len(LAYOUTS), routers, heads, len(ids) + 3, DEVICE)
    layer.slots.probe_with(probe, FIRST_ROUTER)
    return layer, probe, rows(len(ids), IN, torch.float32)


def expected_weights(layer: Layer, probe: RoutingProbe, x: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """[T, routers, heads] float64 of the reference; NaN where there is no router."""
    result = torch.full((len(ids), probe.routers, probe.heads), float("nan"), dtype=torch.float64)
    for token, slot in enumerate(ids):
        for i, part in enumerate(layer.held[slot] if slot >= 0 else []):
            if part is not None and part.layout.has_router:
                w = reference.routing_weights(x[token : token + 1].cpu(), part, torch.float64)
                result[token, FIRST_ROUTER + i, : part.layout.heads] = w[0]
    return result


@pytest.mark.parametrize("run", PATHS)
def test_traces_and_sums(run: Run) -> None:
    ids = testing.token_slots("partial", TOKENS, len(LAYOUTS)).tolist()
    layer, probe, x = make(ids)
    trace = probe.trace(len(ids))
    probe.set(count=True, traces=token_addresses(trace, range(len(ids))))
    run(layer, x, ids)
    w = expected_weights(layer, probe, x, ids)
    torch.testing.assert_close(trace.cpu().double(), w, rtol=0, atol=TOLERANCE, equal_nan=True)
    sums = torch.zeros_like(probe.sums, device="cpu")
    for slot in range(len(LAYOUTS)):
        of_slot = w[[token for token, s in enumerate(ids) if s == slot]]
        sums[slot, :, :-1] = of_slot.nan_to_num().sum(0)
        sums[slot, :, -1] = -torch.xlogy(of_slot, of_slot).nan_to_num().sum((0, 2))
    torch.testing.assert_close(probe.sums.cpu(), sums, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("run", PATHS)
def test_only_the_asked_tokens_are_traced_where_they_belong(run: Run) -> None:
    ids = [0, 2, 2, 2, 0, -1]
    layer, probe, x = make(ids)
    trace, traces = probe.trace(10), np.zeros(len(ids), dtype=np.int64)
    traces[1:4] = token_addresses(trace, [5, 6, 7])
    probe.set(count=False, traces=traces)
    run(layer, x, ids)
    written = ~trace.isnan().all(dim=2).all(dim=1)
    assert written.tolist() == [i in (5, 6, 7) for i in range(10)]
    expected = expected_weights(layer, probe, x, ids)[1:4]
    torch.testing.assert_close(trace[5:8].cpu().double(), expected, rtol=0, atol=TOLERANCE, equal_nan=True)
    assert probe.sums.count_nonzero() == 0


@pytest.mark.parametrize("run", PATHS)
def test_recording_changes_no_bit_and_stops_when_it_is_told(run: Run) -> None:
    ids = testing.token_slots("zipf", TOKENS, len(LAYOUTS)).tolist()
    layer, probe, x = make(ids)
    quiet = run(layer, x, ids)
    assert probe.sums.count_nonzero() == 0
    probe.set(count=True)
    assert torch.equal(run(layer, x, ids), quiet)
    counted = probe.sums.clone()
    assert counted.count_nonzero() > 0
    probe.set(count=False)
    assert torch.equal(run(layer, x, ids), quiet)
    assert torch.equal(probe.sums, counted)
