"""The custom ops as torch sees them: schemas, fake implementations, dispatch, and what the package needs to import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hydra_kernels import Carry, Layout, StepMetadata, reference, testing
from hydra_kernels.ops import library
from hydra_kernels.slots import StackedSlots, meta_args
from hydra_kernels.tuning import ExpandConfig
from triton_cases import GPU

LAYOUTS = [
    Layout(8, 4, has_router=True, carry=Carry.GIVES),
    Layout(3, 2, has_router=True, has_bias=True),
]
OUT = (24, 16)
IDS = [1, 0, -1, 1]
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")])]


def make(device: str) -> tuple[StackedSlots, StepMetadata, torch.Tensor, torch.Tensor]:
    """(slots, metadata, x, y) of a small layer."""
    slots = StackedSlots(2, 40, OUT, testing.capacity_for(LAYOUTS), torch.float32, device)
    for i, layout in enumerate(LAYOUTS):
        slots.load(i, [testing.random_weights(40, out, layout, torch.float32, 2 * i + j) for j, out in enumerate(OUT)])
    meta = StepMetadata(8, 2, device, slots.capacity.heads)
    meta.update(IDS)
    return slots, meta, torch.randn(4, 40, device=device), torch.randn(4, sum(OUT), device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    """Schemas say what is changed in place, fakes have the right shapes, and torch.compile's tracing works."""
    slots, meta, x, y = make(device)
    ops, step = torch.ops.hydra_kernels, meta_args(meta)
    gate = (slots.b, slots.layout, slots.bias, slots.slice_start, slots.out_slices)
    torch.library.opcheck(ops.shrink.default, (x, slots.a, slots.layout, *step))
    z = slots.shrink(x, meta)
    for carry in (meta.carry, None):
        torch.library.opcheck(ops.linear_.default, (y, x, slots.a, *gate, *step, None, 0, carry))
        torch.library.opcheck(ops.expand_.default, (y, z, *gate, *step, None, 0, carry))


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:2], y[:2]), "x: got 2 rows, expected at least the 3 tokens"),
        (lambda x, y: (x.repeat(3, 1), y.repeat(3, 1)), "x: got 12 rows, .* at most its 8"),
        (lambda x, y: (x, y[:3]), r"y: got torch.float32 \[3, 40\] .* expected torch.float32 \[4, 40\]"),
        (lambda x, y: (x, y[:, :-1]), r"y: got .* \[4, 39\]"),
        (lambda x, y: (x[:, :-1], y), r"x: got .* \[4, 39\]"),
        (lambda x, y: (x.T.contiguous().T, y), "x: got .* column stride 4"),
        (lambda x, y: (x, y.T.contiguous().T), "y: got .* column stride 4"),
        (lambda x, y: (x, y.half()), "y: got torch.float16"),
    ],
)
def test_what_does_not_fit_is_not_launched(change: Any, message: str) -> None:
    """The checks before the kernels, which are the same without a GPU."""
    slots, meta, x, y = make("cpu")
    gate = (slots.b, slots.layout, slots.bias, slots.slice_start, slots.out_slices)
    x, y = change(x, y)
    with pytest.raises(ValueError, match=message):
        library._linear_cuda(y, x, slots.a, *gate, *meta_args(meta), None, 0)
    meta.update([-1])  # nothing to do, so nothing is asked for
    library._linear_cuda(y, x, slots.a, *gate, *meta_args(meta), None, 0)


def test_a_z_that_does_not_fit_is_not_launched() -> None:
    slots, meta, _, y = make("cpu")
    gate = (slots.b, slots.layout, slots.bias, slots.slice_start, slots.out_slices)
    for z in (torch.zeros(2, 3, 12), torch.zeros(1, 4, 12), torch.zeros(2, 4, 12).half()):
        with pytest.raises(ValueError, match=r"z: got .* expected float32 \[2, 4, 'rows'\]"):
            library._expand_cuda(y, z, *gate, *meta_args(meta), None, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_for_other_slots_is_refused(device: str) -> None:
    slots, _, x, y = make(device)
    other = StepMetadata(8, 3, device, slots.capacity.heads)
    other.update([2, 0])
    for call in (lambda: slots.linear_(y, x, other), lambda: slots.shrink(x, other)):
        with pytest.raises(ValueError, match="got 3 slots, expected 2"):
            call()
    with pytest.raises(ValueError, match="got 3 slots, expected 2"):
        slots.expand_(y, torch.zeros(2, 4, slots.capacity.rows, device=device), other)


def test_only_an_expand_behind_its_own_shrink_starts_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls expand_ alone may have written y just before, with a kernel that does not wait for anyone."""
    machine_code = pytest.importorskip("hydra_kernels.tuning.machine_code", reason="Triton is not installed")
    from hydra_kernels.ops import expand

    def measured(*_: object) -> ExpandConfig:
        return ExpandConfig(16, 16, 64, 1, 32, pdl=True)

    for module in (library, expand):
        monkeypatch.setattr(module, "expand_config", measured)
    slots, meta, x, y = make("cpu")
    gate = (slots.b, slots.layout, slots.bias, slots.slice_start, slots.out_slices)
    with machine_code.recorded() as launches:
        library._linear_cuda(torch.randn(4, 50), x, slots.a, *gate, *meta_args(meta), None, 0, meta.carry)  # wider y
        library._expand_cuda(y, torch.zeros(2, 4, slots.capacity.rows), *gate, *meta_args(meta), None, 0, meta.carry)
    assert [launch.arguments["PDL"] for launch in launches] == [True, True, False]
    with machine_code.recorded() as warm:
        library.launch_empty_steps(slots, 8)
    assert codes(machine_code, launches[1:]) <= codes(machine_code, warm)


def test_the_reference_stays_on_its_tensors_device() -> None:
    """The GPU benchmark compares there; a gate without a router is made from nothing that has a device."""
    held = testing.random_weights(32, 8, Layout(16), torch.float32).to(device="meta")
    y, x = torch.empty(4, 8, device="meta"), torch.empty(4, 32, device="meta")
    assert reference.linear(y, x, [0, -1, 0, 0], [[held]], (8,)).device == y.device


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
