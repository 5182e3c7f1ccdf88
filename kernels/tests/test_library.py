"""The custom ops as torch sees them: schemas, fake implementations, dispatch, and what the package needs to import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hydra_kernels import Layout, StepMetadata, reference, testing
from hydra_kernels.ops import library
from hydra_kernels.slots import StackedSlots, meta_args
from triton_cases import GPU, on_gpu

LAYOUTS = [Layout(8, 4, has_router=True), Layout(3, 2, has_router=True, has_bias=True)]
OUT = (24, 16)
IDS = [1, 0, -1, 1]
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")])]


def make(device: str) -> tuple[StackedSlots, StepMetadata, torch.Tensor, torch.Tensor]:
    """(slots, metadata, x, y) of a small layer."""
    slots = StackedSlots(2, 40, OUT, testing.capacity_for(LAYOUTS), torch.float32, device)
    for i, layout in enumerate(LAYOUTS):
        slots.load(i, [testing.random_weights(40, out, layout, torch.float32, 2 * i + j) for j, out in enumerate(OUT)])
    meta = StepMetadata(8, 2, device)
    meta.update(IDS)
    return slots, meta, torch.randn(4, 40, device=device), torch.randn(4, sum(OUT), device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    """Schemas say what is changed in place, fakes have the right shapes, and torch.compile's tracing works."""
    slots, meta, x, y = make(device)
    ops, step = torch.ops.hydra_kernels, meta_args(meta)
    gate = (slots.b, slots.layout, slots.bias, slots.slice_start, slots.out_slices)
    probe = None, 0
    torch.library.opcheck(ops.linear_.default, (y, x, slots.a, *gate, *step, *probe))
    torch.library.opcheck(ops.shrink.default, (x, slots.a, slots.layout, *step))
    torch.library.opcheck(ops.expand_.default, (y, slots.shrink(x, meta), *gate, *step, *probe))


@pytest.mark.parametrize("device", DEVICES)
def test_shrink_and_expand_are_linear(device: str) -> None:
    slots, meta, x, y = make(device)
    apart = y.clone()
    slots.linear_(y, x, meta)
    z = slots.shrink(x, meta)
    assert z.shape == (2, 4, slots.capacity.rows)
    assert z[:, 2].count_nonzero() == 0
    slots.expand_(apart, z, meta)
    assert torch.equal(y, apart)


def test_compiled_function_calls_the_op_with_the_step_of_the_call() -> None:
    """The metadata is read when the op runs, not when the function is traced."""
    slots, meta, x, y = make("cpu")
    held = [
        [testing.random_weights(40, out, layout, torch.float32, 2 * i + j) for j, out in enumerate(OUT)]
        for i, layout in enumerate(LAYOUTS)
    ]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def layer(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        result = y + 1
        slots.linear_(result, x, meta)
        return result

    for ids in (IDS, [0, 0, 0, 1], [-1] * 4):
        meta.update(ids)
        expected = reference.linear(y + 1, x, ids, held, OUT, torch.float64)
        assert testing.max_error(layer(y, x), expected) < testing.TOLERANCE[torch.float32]


def codes(machine_code: Any, launches: Sequence[Any]) -> set[tuple[str, ...]]:
    """What makes launches different machine code."""
    of = machine_code.Specialisation.of
    return {(x.kernel.__name__, str(of(x)), str(x.options)) for x in launches}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_warm_up_leaves_nothing_to_compile(dtype: torch.dtype) -> None:
    """Whatever the number of tokens, a later call launches only what the warm-up launched."""
    machine_code = pytest.importorskip("hydra_kernels.tuning.machine_code", reason="Triton is not installed")
    from hydra_kernels.ops import expand, shrink

    slots = StackedSlots(2, 2048, OUT, testing.capacity_for(LAYOUTS), dtype, "cpu")
    with machine_code.recorded() as launches:
        library.launch_empty_steps(slots, 20000)
    assert all(launch.grid[0] == 0 or launch.kernel.__name__ == "_sum_kernel" for launch in launches)
    known = codes(machine_code, launches)
    gate = (slots.b, slots.layout, slots.bias, slots.slice_start, slots.out_slices)
    for tokens in (1, 2, 3, 16, 17, 500, 512, 513, 2047, 8191, 8192, 8193, 20000):
        meta = StepMetadata(20000, 2, heads=slots.capacity.heads)
        meta.update([0] * tokens)
        with machine_code.recorded() as launches:
            z = shrink.shrink_partials(torch.empty(tokens, 2048, dtype=dtype), slots.a, slots.layout, *meta_args(meta))
            expand.expand_(torch.empty(tokens, sum(OUT), dtype=dtype), z, *gate, *meta_args(meta), carry=meta.carry)
            z = shrink.sum_partials(z, slots.capacity.rows, slots.layout, meta.device, meta.max_tokens, 2)
            expand.expand_(torch.empty(tokens, sum(OUT), dtype=dtype), z, *gate, *meta_args(meta), carry=meta.carry)
        assert len(launches) == 4
        assert codes(machine_code, launches) <= known, tokens


@on_gpu
def test_rows_that_do_not_fit_are_refused() -> None:
    slots, meta, x, y = make("cuda")
    with pytest.raises(ValueError, match="got 2 rows"):
        slots.linear_(y[:2], x[:2], meta)
    with pytest.raises(ValueError, match="column stride 4"):
        slots.linear_(y, x.T.contiguous().T, meta)


def test_the_package_needs_neither_triton_nor_a_gpu() -> None:
    """Everything public works where `import triton` fails."""
    code = """
import sys
sys.modules["triton"] = None  # from here on, importing it raises ImportError
import torch, hydra_kernels as hk
from hydra_kernels import testing, tuning
from hydra_kernels.slots import StackedSlots
layout = hk.Layout(8, 4, has_router=True)
slots = StackedSlots(1, 16, (8,), testing.capacity_for([layout]), torch.float32, "cpu")
slots.load(0, [testing.random_weights(16, 8, layout, torch.float32)])
meta = hk.StepMetadata(2, 1)
meta.update([0, -1])
y = torch.zeros(2, 8)
hk.linear_(y, torch.ones(2, 16), slots, meta)
assert y[0].count_nonzero() == 8 and y[1].count_nonzero() == 0
print("done")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "done", run.stderr
