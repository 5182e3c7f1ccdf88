"""What the tests of the Triton kernels share: where they run, and a layer with loaded slots and a step's input.

They run on a GPU, or without one in Triton's interpreter, which has to be chosen before Triton is imported: with
TRITON_INTERPRET=1 in the environment of the process. `test_interpreter.py` starts such processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import hydra_kernels as hk
import pytest
import torch
from hydra_kernels import reference, testing
from hydra_kernels.slots import StackedSlots, meta_args
from hydra_kernels.tuning import ExpandConfig, ShrinkConfig

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"

needs_triton = pytest.mark.skipif(
    not (GPU or INTERPRETED), reason="no GPU, and no TRITON_INTERPRET=1: test_interpreter.py runs this file with it"
)


def on_gpu(test: Callable[..., None]) -> pytest.MarkDecorator:
    """Marks a test that only a GPU can run."""
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")(test))


DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not GPU, reason="needs a GPU: Triton's interpreter gets bfloat16 dots silently wrong"),
        ],
    ),
]

# Every kind of gate; ranks that are and are not a multiple of 8.
LAYOUTS = [
    hk.Layout(8, 4, has_router=True),
    hk.Layout(3, 1),
    hk.Layout(16, 3, has_router=True, has_bias=True),
    hk.Layout(4, 8, shared_a=False, top_k=2, has_router=True),
    hk.Layout(5, 3, top_k=2, renormalize=False, has_router=True),
    hk.Layout(8, 2, shared_a=False, has_router=True, has_bias=True),
    hk.Layout(2, 3),
]

# Tokens, in, out slices: nothing is a multiple of a block. The interpreter takes some 10 ms for a program.
TOKENS, IN, OUT = (333, 4096 + 24, (1032, 200)) if GPU else (19, 72, (40, 20))

SHRINK_CONFIGS = [ShrinkConfig(16, 1, 32, 32), ShrinkConfig(64, 16, 16, 64), ShrinkConfig(64, 4, 32, 128, stages=2)]
EXPAND_CONFIGS = [
    ExpandConfig(16, 16, 64, 1, 32),
    ExpandConfig(64, 32, 64, 2, 64, warps=8),
    ExpandConfig(64, 64, 128, 1, 16, warps=8),
]


@dataclass
class Layer:
    """A layer with loaded slots on the device under test."""

    slots: StackedSlots
    held: list[list[hk.HydraWeights | None]]

    def step(self, ids: Sequence[int]) -> hk.StepMetadata:
        meta = hk.StepMetadata(max(len(ids), 1), self.slots.num_slots, self.slots.device)
        meta.update(ids)
        return meta

    def shrink_partials(
        self, x: torch.Tensor, meta: hk.StepMetadata, config: ShrinkConfig = SHRINK_CONFIGS[0]
    ) -> torch.Tensor:
        from hydra_kernels.ops.shrink import shrink_partials

        return shrink_partials(x, self.slots.a, self.slots.layout, *meta_args(meta), config)

    def shrink(self, x: torch.Tensor, meta: hk.StepMetadata, config: ShrinkConfig = SHRINK_CONFIGS[0]) -> torch.Tensor:
        from hydra_kernels.ops.shrink import shrink

        return shrink(x, self.slots.a, self.slots.layout, *meta_args(meta), config)

    def expand_(
        self, y: torch.Tensor, z: torch.Tensor, meta: hk.StepMetadata, config: ExpandConfig = EXPAND_CONFIGS[0]
    ) -> None:
        from hydra_kernels.ops.expand import expand_

        s = self.slots
        probe = None if s.probe is None else s.probe.control
        step = *meta_args(meta), config, probe, s.first_router, meta.carry
        expand_(y, z, s.b, s.layout, s.bias, s.slice_start, s.out_slices, *step)

    def linear_(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        meta: hk.StepMetadata,
        configs: tuple[ShrinkConfig, ExpandConfig] = (SHRINK_CONFIGS[0], EXPAND_CONFIGS[0]),
    ) -> None:
        self.expand_(y, self.shrink_partials(x, meta, configs[0]), meta, configs[1])

    def expected(self, y: torch.Tensor, x: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
        """The reference in float64, on the CPU."""
        held = [[w if w is None else w.to(device="cpu") for w in part] for part in self.held]
        return reference.linear(y.cpu(), x.cpu(), list(ids), held, self.slots.out_slices, torch.float64)


def make_layer(
    layouts: Sequence[hk.Layout],
    dtype: torch.dtype,
    in_features: int = IN,
    out: Sequence[int] = OUT,
    *,
    all_slices: bool = False,
) -> Layer:
    """Slot i holds `layouts[i]`; some slices of some slots are not adapted, unless `all_slices`."""
    slots = StackedSlots(len(layouts), in_features, out, testing.capacity_for(layouts), dtype, DEVICE)
    held: list[list[hk.HydraWeights | None]] = []
    for i, layout in enumerate(layouts):
        parts = [testing.random_weights(in_features, o, layout, dtype, 10 * i + j) for j, o in enumerate(out)]
        held.append([None if (i + j) % 4 == 3 and not all_slices else part for j, part in enumerate(parts)])
        slots.load(i, held[-1])
    return Layer(slots, held)


def rows(tokens: int, width: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """[tokens, width] normal numbers on the device under test."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that a launcher allocates starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: testing.poison(empty(*a, **k)))
