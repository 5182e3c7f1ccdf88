"""Compile the kernels for a GPU that is not there, and read what the machine code needs: registers, spills, memory.

A launch is recorded exactly as the launchers make it, on tensors without memory (device "meta"), so that what is
compiled here is what runs on that GPU.
"""

# Triton has no type information:
# mypy: disable-error-code="import-untyped"
from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hydra_kernels.metadata import StepMetadata
from hydra_kernels.ops import expand, shrink
from hydra_kernels.slots import SlotCapacity
from hydra_kernels.tuning.config import ExpandConfig, ShrinkConfig
from hydra_kernels.tuning.shapes import LayerShape
from hydra_kernels.weights import LAYOUT_FIELDS

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments by name, and the launch options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel needs.

    registers:    of a thread.
    stack_bytes:  of a thread; not 0 where registers are spilled or indexed.
    spills:       instructions that read or write a thread's local memory.
    shared_bytes: of a program, static and dynamic.
    matrix:       the matrix instructions, HMMA (warp) or HGMMA (warp group), with their shapes.
    loads:        how many global loads there are of each width in bits.
    pdl:          of programmatic dependent launch: PREEXIT (lets the next kernel start), ACQBULK (waits for the last).
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    matrix: tuple[str, ...]
    loads: Mapping[int, int]
    pdl: tuple[str, ...]


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*values: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in LAUNCH_OPTIONS if name in named}
            arguments = dict(zip(self.kernel.arg_names, values, strict=False)) | named
            self.launches.append(Launch(self.kernel, grid, arguments, options))

        return launch


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of shrink and expand are appended to the list instead of being run."""
    launches: list[Launch] = []
    kernels = [(shrink, "_shrink_kernel"), (shrink, "_sum_kernel"), (expand, "_expand_kernel")]
    with ExitStack() as stack:
        for module, name in kernels:
            recorder = _Recorder(getattr(module, name), launches)
            stack.enter_context(mock.patch.object(module, name, recorder))
        yield launches


def linear_launches(
    shape: LayerShape,
    capacity: SlotCapacity,
    tokens: int,
    dtype: torch.dtype,
    shrink_config: ShrinkConfig | None = None,
    expand_config: ExpandConfig | None = None,
    slots: int = 8,
    probe: bool = False,
) -> tuple[Launch, Launch, Launch]:
    """The shrink and the expand of one call on a GPU for which nothing was measured, or with the given block sizes;
    and, for row-parallel layers, the sum of that shrink's partial sums.

    probe: with the recording of routing weights.
    """

    def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    meta = StepMetadata(tokens, slots)
    meta.update([0] * tokens)
    step = meta.host, empty(meta.host.numel(), dtype=torch.int32), tokens, slots
    slices = len(shape.out_slices)
    a = empty(slots, slices, capacity.rows, shape.in_features)
    b = empty(slots, shape.out, capacity.k)
    layout = empty(slots, slices, LAYOUT_FIELDS, dtype=torch.int32)
    bias = empty(slots, slices, capacity.heads, dtype=torch.float32)
    starts = empty(slices + 1, dtype=torch.int32)
    pdl = expand_config is not None and expand_config.pdl
    with recorded() as launches:
        z = shrink.shrink_partials(empty(tokens, shape.in_features), a, layout, *step, shrink_config, pdl)
        y = empty(tokens, shape.out)
        control = empty(tokens, dtype=torch.int64) if probe else None
        carry = empty(tokens, capacity.heads, dtype=torch.float32)  # as the engine has it
        gate = b, layout, bias, starts, shape.out_slices
        expand.expand_(y, z, *gate, *step, expand_config, control, carry=carry)
        shrink.sum_partials(z, capacity.rows, layout, step[1], tokens, slots)
    return launches[0], launches[1], launches[2]


@dataclass(frozen=True)
class Specialisation:
    """A launch's arguments as Triton compiles them: pointers and multiples of 16 are known as such, 1 is constant."""

    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    attributes: Mapping[tuple[int], list[list[Any]]]

    @staticmethod
    def of(launch: Launch) -> Specialisation:
        params = {p.name: p for p in launch.kernel.params}
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        for i, name in enumerate(launch.kernel.arg_names):
            value, free = launch.arguments[name], params[name].do_not_specialize
            if params[name].is_constexpr or (not free and isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(i,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
            else:
                signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
                if not free and value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        return Specialisation(signature, constants, attributes)


def compile_launch(launch: Launch, capability: int) -> MachineCode:
    """Compile a recorded launch for compute capability `capability` (90 for Hopper). Needs no GPU."""
    special = Specialisation.of(launch)
    source = ASTSource(launch.kernel, special.signature, special.constants, special.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    return inspect(compiled.asm["cubin"], compiled.metadata.shared)


def inspect(cubin: bytes, shared_bytes: int) -> MachineCode:
    """Read the resources and the instructions of a cubin with the disassembler that Triton brings."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    needs = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    names = re.findall(r"\bLDG(?:STS)?\.E\S*", sass)
    widths = [int((re.search(r"\.U?(8|16|64|128)\b", name) or (0, 32))[1]) for name in names]
    return MachineCode(
        registers=needs["REG"],
        stack_bytes=needs["STACK"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=shared_bytes,
        matrix=tuple(sorted(set(re.findall(r"\bH?[HG]MMA\.\S+", sass)))),
        loads={w: widths.count(w) for w in sorted(set(widths))},
        pdl=tuple(sorted(set(re.findall(r"\b(?:PREEXIT|ACQBULK)\b", sass)))),
    )
