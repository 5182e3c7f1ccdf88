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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
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
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    matrix: tuple[str, ...]
    loads: Mapping[int, int]


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
def recorded(module: Any, *kernels: str) -> Iterator[list[Launch]]:
    """Launches of a module's kernels are appended to the list instead of being run."""
    launches: list[Launch] = []
    patches = [mock.patch.object(module, name, _Recorder(getattr(module, name), launches)) for name in kernels]
    for patch in patches:
        patch.start()
    try:
        yield launches
    finally:
        for patch in patches:
            patch.stop()


def compile_launch(launch: Launch, capability: int) -> MachineCode:
    """Compile a recorded launch for compute capability `capability` (90 for Hopper). Needs no GPU.

    Arguments are specialised as Triton does it when it launches: pointers and multiples of 16 are known as such.
    """
    kernel = launch.kernel
    constants = {p.name for p in kernel.params if p.is_constexpr}
    free = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = launch.arguments[name]
        if name in constants or (isinstance(value, int) and value == 1 and name not in free):
            signature[name], constexprs[name] = "constexpr", value
            continue
        aligned = True
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        else:
            signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
            aligned = value % 16 == 0
        if aligned and name not in free:
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attrs)
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
    )
