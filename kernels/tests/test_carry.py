"""Routers that several layers share: logits go from a layer to one behind it in the same step."""

from __future__ import annotations

from dataclasses import replace

import hydra_kernels as hk
import pytest
import torch
from hydra_kernels import Carry, Layout, reference, testing
from hydra_kernels.ops import cpu
from hydra_kernels.slots import LayerSlots, StackedSlots
from triton_cases import DEVICE, EXPAND_CONFIGS, SHRINK_CONFIGS, Layer, needs_triton

HIDDEN, WIDE, TOKENS = 48, 72, 29
LAYOUTS = {
    "dense": Layout(8, 4, has_router=True, has_bias=True),
    "argmax": Layout(8, 4, top_k=1, has_router=True, has_bias=True),
    "odd": Layout(3, 3, top_k=2, renormalize=False, has_router=True),
}
IDS = [(t * 7) % 5 - 1 for t in range(TOKENS)]  # -1 to 3, mixed


def block(layout: Layout, dtype: torch.dtype, seed: int) -> tuple[list[hk.HydraWeights], hk.HydraWeights]:
    """Weights of gate, up and down, of which down has gate's routing."""
    gate, up = (testing.random_weights(HIDDEN, WIDE, layout, dtype, seed + i) for i in range(2))
    up = replace(up, router=gate.router, bias=gate.bias)
    taking = replace(layout, has_router=False, has_bias=False, carry=Carry.TAKES)
    down = testing.random_weights(WIDE, HIDDEN, taking, dtype, seed + 2)
    return [replace(gate, layout=replace(layout, carry=Carry.GIVES)), up], down


def plain(x: torch.Tensor, h: torch.Tensor, gate: hk.HydraWeights, down: hk.HydraWeights) -> torch.Tensor:
    """What down adds to the block's output for one token, written out: the router sees the block's input x."""
    assert gate.router is not None
    logits = gate.router.double() @ x
    weights = torch.softmax(logits if gate.bias is None else logits + gate.bias.double(), 0)
    layout = down.layout
    if layout.top_k:
        kept = torch.topk(weights, layout.top_k).indices
        weights = torch.zeros_like(weights).index_copy(0, kept, weights[kept])
        weights = weights / weights.sum() if layout.renormalize else weights
    low = down.a.double() @ h
    return down.scaling * sum(w * (b.double() @ low) for w, b in zip(weights, down.b, strict=True))  # type: ignore[return-value]


class Block:
    """Slots 0 to 2 share routers in each way, slot 3 does not share; on one kind of slots."""

    def __init__(self, slots: type[LayerSlots], dtype: torch.dtype, device: str = "cpu") -> None:
        self.weights = [block(layout, dtype, 10 * i) for i, layout in enumerate(LAYOUTS.values())]
        own = [testing.random_weights(HIDDEN, WIDE, LAYOUTS["dense"], dtype, 90 + i) for i in range(2)]
        self.weights.append((own, testing.random_weights(WIDE, HIDDEN, LAYOUTS["dense"], dtype, 92)))
        capacity = testing.capacity_for(list(LAYOUTS.values()))
        self.first = slots(4, HIDDEN, (WIDE, WIDE), capacity, dtype, device)
        self.second = slots(4, WIDE, (HIDDEN,), capacity, dtype, device)
        for i, (parts, down) in enumerate(self.weights):
            self.first.load(i, parts)
            self.second.load(i, [down])
        self.meta = hk.StepMetadata(64, 4, device, heads=capacity.heads)
        self.meta.update(IDS)
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).to(device)
        self.h = torch.randn(TOKENS, WIDE, generator=generator).to(dtype).to(device)  # the second layer's input

    def expected(self) -> torch.Tensor:
        """What the second layer adds: by hand, in float64."""
        result = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
        for t, slot in enumerate(IDS):
            x, h = self.x[t].cpu().double(), self.h[t].cpu().double()
            if slot == 3:
                result[t] = reference.delta(h[None], self.weights[3][1], torch.float64)[0]
            elif slot >= 0:
                parts, down = self.weights[slot]
                result[t] = plain(x, h, parts[0], down)
        return result


def test_reference_is_the_block_written_out() -> None:
    case = Block(StackedSlots, torch.float32)
    carry = torch.zeros(TOKENS, 4, dtype=torch.float64)
    first = [parts for parts, _ in case.weights]
    y = torch.zeros(TOKENS, 2 * WIDE)
    reference.linear(y, case.x, IDS, first, (WIDE, WIDE), torch.float64, carry)
    second = [[down] for _, down in case.weights]
    got = reference.linear(y[:, :HIDDEN], case.h, IDS, second, (HIDDEN,), torch.float64, carry)
    torch.testing.assert_close(got, case.expected(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", testing.TOLERANCE, ids=str)
@pytest.mark.parametrize("slots", [StackedSlots, cpu.PackedSlots])
@pytest.mark.parametrize("split", [False, True], ids=["linear_", "shrink and expand_"])
def test_a_block_with_one_router(slots: type[LayerSlots], dtype: torch.dtype, split: bool) -> None:
    case = Block(slots, dtype)
    expected_first = reference.linear(
        torch.zeros(TOKENS, 2 * WIDE), case.x, IDS, [parts for parts, _ in case.weights], (WIDE, WIDE), torch.float64
    )
    first, second = torch.zeros(TOKENS, 2 * WIDE, dtype=dtype), torch.zeros(TOKENS, HIDDEN, dtype=dtype)
    for layer, x, y in ((case.first, case.x, first), (case.second, case.h, second)):
        if split:
            hk.expand_(y, hk.shrink(x, layer, case.meta), layer, case.meta)
        else:
            hk.linear_(y, x, layer, case.meta)
    assert testing.max_error(first, expected_first) < testing.TOLERANCE[dtype]
    assert testing.max_error(second, case.expected()) < testing.TOLERANCE[dtype]


@pytest.mark.parametrize("slots", [StackedSlots, cpu.PackedSlots])
def test_a_compiled_block_with_one_router(slots: type[LayerSlots]) -> None:
    """The compiler, which sees what is written, keeps the order of the two layers though they share no other tensor."""
    case = Block(slots, torch.float32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        first, second = x.new_zeros(TOKENS, 2 * WIDE), x.new_zeros(TOKENS, HIDDEN)
        hk.linear_(first, x, case.first, case.meta)
        hk.linear_(second, h, case.second, case.meta)
        return second

    assert testing.max_error(run(case.x, case.h), case.expected()) < testing.TOLERANCE[torch.float32]


@pytest.mark.parametrize("slots", [StackedSlots, cpu.PackedSlots])
def test_without_a_carry_such_an_adapter_is_refused(slots: type[LayerSlots]) -> None:
    case = Block(slots, torch.float32)
    without = hk.StepMetadata(64, 4)
    without.update(IDS)
    with pytest.raises(ValueError, match="carry of 0 heads, expected 4"):
        hk.linear_(torch.zeros(TOKENS, HIDDEN), case.h, case.second, without)


def test_the_native_operator_checks_the_carry() -> None:
    case = Block(cpu.PackedSlots, torch.float32)
    assert isinstance(case.second, cpu.PackedSlots)
    y = torch.zeros(TOKENS, HIDDEN)
    for carry, text in ((None, "got 0 heads"), (torch.zeros(5, 4), "got 5 rows"), (torch.zeros(64, 2), "got 2 heads")):
        with pytest.raises(RuntimeError, match=text):
            torch.ops.hydra_kernels.cpu_linear_(y, case.h, case.second.table, case.meta.host, carry)


def test_who_gives_has_a_router_and_who_takes_has_none() -> None:
    with pytest.raises(ValueError, match="GIVES"):
        Layout(4, 2, carry=Carry.GIVES)
    with pytest.raises(ValueError, match="TAKES"):
        Layout(4, 2, has_router=True, carry=Carry.TAKES)
    for layout in (*LAYOUTS.values(), Layout(4, 2, carry=Carry.TAKES)):
        assert Layout.of_record(layout.record()) == layout


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("configs", list(zip(SHRINK_CONFIGS, EXPAND_CONFIGS, strict=True))[:2], ids=str)
def test_a_block_with_one_router_in_triton(dtype: torch.dtype, configs: tuple) -> None:  # type: ignore[type-arg]
    case = Block(StackedSlots, dtype, DEVICE)
    testing.poison(case.meta.carry)  # type: ignore[arg-type]
    first = torch.zeros(TOKENS, 2 * WIDE, dtype=dtype, device=DEVICE)
    second = torch.zeros(TOKENS, HIDDEN, dtype=dtype, device=DEVICE)
    for slots, x, y in ((case.first, case.x, first), (case.second, case.h, second)):
        Layer(slots, []).linear_(y, x, case.meta, configs)  # type: ignore[arg-type]
    assert testing.max_error(second.cpu(), case.expected()) < testing.TOLERANCE[dtype]
