"""The Triton shrink against the reference."""

from __future__ import annotations

import pytest
import torch
from hydra_kernels import Layout, testing
from hydra_kernels.tuning import ShrinkConfig
from triton_cases import (
    DEVICE,
    DTYPES,
    GPU,
    IN,
    LAYOUTS,
    SHRINK_CONFIGS,
    TOKENS,
    Layer,
    make_layer,
    needs_triton,
    on_gpu,
    poisoned_memory,
    rows,
)

__all__ = ["poisoned_memory"]
pytestmark = needs_triton

# Products of 16-bit numbers are exact in float32, but tensor cores cut off the last bits when they add them up.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}


def expected_z(layer: Layer, x: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """[slices, T, rows] in float64, 0 where there is no slot."""
    z = torch.zeros(len(layer.slots.out_slices), len(ids), layer.slots.capacity.rows, dtype=torch.float64)
    for t, slot in enumerate(ids):
        for i, weights in enumerate(layer.held[slot] if slot >= 0 else []):
            if weights is not None:
                stacked = weights.to(device="cpu").stacked_a().double()
                z[i, t, : len(stacked)] = stacked @ x[t].cpu().double()
    return z


@pytest.mark.parametrize("mix", testing.MIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_shrink_matches_reference(mix: str, dtype: torch.dtype) -> None:
    layer = make_layer(LAYOUTS, dtype)
    ids = testing.token_slots(mix, TOKENS, len(LAYOUTS)).tolist()
    x = rows(TOKENS, IN, dtype)
    z = layer.shrink(x, layer.step(ids)).cpu()
    expected = expected_z(layer, x, ids)
    assert testing.max_error(z, expected) < TOLERANCE[dtype]
    assert torch.equal(z == 0, expected == 0)


@pytest.mark.parametrize("config", SHRINK_CONFIGS, ids=str)
def test_configurations_agree(config: ShrinkConfig) -> None:
    """However `in` is spread over programs, each sum has the same bits; with a GPU also whatever the tile."""
    n_in, tokens = 6 * 512 + 40, 5 if not GPU else 300
    layer = make_layer([Layout(3, 2, has_router=True), Layout(4)], torch.float16, n_in, (8,))
    x, meta = rows(tokens, n_in, torch.float16), layer.step([i % 2 for i in range(tokens)])
    base = ShrinkConfig(16 if GPU else config.tile, 4, config.block_rows, config.block_in)
    assert torch.equal(layer.shrink(x, meta, config), layer.shrink(x, meta, base))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1),
        Layout(1, 16, has_router=True),
        Layout(128, 1),
        Layout(128, 2, has_router=True),
        Layout(13, 5, shared_a=False, has_router=True),
    ],
    ids=str,
)
def test_ranks_and_heads(layout: Layout) -> None:
    layer = make_layer([layout], torch.float32, 40, (8,))
    x = rows(1, 40, torch.float32)
    z = layer.shrink(x, layer.step([0])).cpu()
    assert testing.max_error(z, expected_z(layer, x, [0])) < 2e-5


def test_neighbours_and_repeats_change_nothing() -> None:
    layer = make_layer(LAYOUTS[:3], torch.float16)
    x, ids = rows(TOKENS, IN, torch.float16), [i % 3 for i in range(TOKENS)]
    z = layer.shrink(x, layer.step(ids))
    assert torch.equal(z, layer.shrink(x, layer.step(ids)))
    others = rows(TOKENS, IN, torch.float16, seed=2)
    others[4] = x[4]
    ids = [ids[4]] * TOKENS
    assert torch.equal(z[:, 4], layer.shrink(others, layer.step(ids))[:, 4])


def test_rows_of_a_wider_tensor() -> None:
    layer = make_layer(LAYOUTS[:2], torch.float32)
    wide, ids = rows(5, 3 * IN, torch.float32), [0, 1, -1, 1, 0]
    x = wide[:, IN : 2 * IN]
    meta = layer.step(ids)
    assert torch.equal(layer.shrink(x, meta), layer.shrink(x.contiguous(), meta))


@on_gpu
def test_offsets_beyond_two_to_the_31() -> None:
    layer = make_layer([LAYOUTS[0]], torch.float16, 256, (16,))
    stride = 3 * 2**29  # third row: 3 * 2^30 elements from the first
    memory = torch.zeros(2 * stride + 256, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((3, 256), (stride, 1))
    x.copy_(rows(3, 256, torch.float16))
    z = layer.shrink(x, layer.step([0, 0, 0])).cpu()
    assert testing.max_error(z, expected_z(layer, x.contiguous(), [0, 0, 0])) < TOLERANCE[torch.float16]
