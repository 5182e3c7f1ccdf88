"""The Triton expand, with its gate, against the reference."""

from __future__ import annotations

import pytest
import torch
from hydra_kernels import Layout, reference, testing
from hydra_kernels.tuning import ExpandConfig
from triton_cases import (
    DEVICE,
    DTYPES,
    EXPAND_CONFIGS,
    LAYOUTS,
    OUT,
    TOKENS,
    Layer,
    make_layer,
    needs_triton,
    on_gpu,
    rows,
)

pytestmark = needs_triton


def random_z(layer: Layer, tokens: int, splits: int = 1, seed: int = 3) -> torch.Tensor:
    """[splits, slices, T, rows], NaN in the rows of z that no slot has."""
    z = rows(splits * len(layer.slots.out_slices) * tokens, layer.slots.capacity.rows, torch.float32, seed)
    return z.view(splits, len(layer.slots.out_slices), tokens, -1)


def poison_unused(layer: Layer, z: torch.Tensor, ids: list[int]) -> None:
    """What shrink does not write: tokens without a slot, and rows beyond a slot's own."""
    for t, slot in enumerate(ids):
        for i in range(z.shape[1]):
            weights = layer.held[slot][i] if slot >= 0 else None
            testing.poison(z[:, i, t, 0 if weights is None else weights.layout.z_rows :])


def expected_y(layer: Layer, y: torch.Tensor, z: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """y + B h in float64, from a z [slices, T, rows]."""
    result, z = y.cpu().double(), z.cpu().double()
    for t, slot in enumerate(ids):
        start = 0
        for i, out in enumerate(layer.slots.out_slices):
            weights = layer.held[slot][i] if slot >= 0 else None
            if weights is not None:
                lay = weights.layout
                u = z[i, t, : lay.a_rows].view(1 if lay.shared_a else lay.heads, lay.rank)
                logits = None
                if lay.has_router:
                    logits = z[None, i, t, lay.a_rows : lay.z_rows]
                    logits = logits if weights.bias is None else logits + weights.bias.cpu().double()
                h = reference.gate(logits, lay, 1, torch.float64).T * u
                result[t, start : start + out] += weights.flat_b().cpu().double() @ h.flatten()
            start += out
    return result


@pytest.mark.parametrize("mix", testing.MIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expand_matches_reference(mix: str, dtype: torch.dtype) -> None:
    layer = make_layer(LAYOUTS, dtype)
    ids = testing.token_slots(mix, TOKENS, len(LAYOUTS)).tolist()
    y, z = rows(TOKENS, sum(OUT), dtype), random_z(layer, TOKENS)
    expected = expected_y(layer, y, z[0], ids)
    untouched = expected == y.cpu()
    poison_unused(layer, z, ids)
    before = y.clone()
    layer.expand_(y, z[0], layer.step(ids))
    assert testing.max_error(y.cpu(), expected) < testing.TOLERANCE[dtype]
    assert torch.equal(y.cpu()[untouched], before.cpu()[untouched])


@pytest.mark.parametrize("splits", [2, 5, 8, 14])
def test_partial_sums(splits: int) -> None:
    layer = make_layer([LAYOUTS[0], LAYOUTS[4]], torch.float32, out=(40,))
    z, ids = random_z(layer, 3, splits), [0, 1, 0]
    y = rows(3, 40, torch.float32)
    expected = expected_y(layer, y, z.double().sum(0), ids)
    layer.expand_(y, z, layer.step(ids))
    assert testing.max_error(y.cpu(), expected) < 2e-5


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1),
        Layout(1, 16, has_router=True),
        Layout(128, 1),
        Layout(128, 2, has_router=True),
        Layout(13, 5, shared_a=False, has_router=True),
        Layout(16, 16, has_router=True, top_k=4, renormalize=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", EXPAND_CONFIGS, ids=str)
def test_ranks_and_heads(layout: Layout, config: ExpandConfig) -> None:
    """Blocks of K hold a part of a head, one head, or several; one or all columns of y."""
    layer = make_layer([layout], torch.float32, 40, (150,))
    y, z = rows(1, 150, torch.float32), random_z(layer, 1)
    expected = expected_y(layer, y, z[0], [0])
    layer.expand_(y, z, layer.step([0]), config)
    assert testing.max_error(y.cpu(), expected) < 2e-5


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_first_head_wins_a_tie(renormalize: bool) -> None:
    layout = Layout(8, 4, top_k=2, renormalize=renormalize, has_router=True)
    layer = make_layer([layout], torch.float32, 40, (16,))
    z = random_z(layer, 2)
    z[..., layout.a_rows :] = torch.tensor([[0.5, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 3.0]], device=DEVICE)
    y = rows(2, 16, torch.float32)
    expected = expected_y(layer, y, z[0], [0, 0])
    layer.expand_(y, z, layer.step([0, 0]))
    assert testing.max_error(y.cpu(), expected) < 2e-5


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("wrong", [[2], [0, 1, 2, 3]], ids=["one head", "all heads"])
def test_a_logit_that_is_no_number_is_not_hidden(top_k: int, wrong: list[int]) -> None:
    """As in the reference, the whole row is NaN, and no other row is."""
    layout = Layout(8, 4, top_k=top_k, has_router=True)
    layer = make_layer([layout], torch.float32, 40, (16,))
    z, y = random_z(layer, 3), rows(3, 16, torch.float32)
    z[..., 1, layout.a_rows + torch.tensor(wrong)] = float("nan")
    expected = expected_y(layer, y, z[0], [0, 0, 0])
    assert expected[1].isnan().all()
    layer.expand_(y, z, layer.step([0, 0, 0]))
    assert y[1].isnan().all()
    assert testing.max_error(y[[0, 2]].cpu(), expected[[0, 2]]) < 2e-5


def test_what_an_earlier_adapter_left_is_not_read() -> None:
    """A slot is loaded again with a smaller adapter, after one whose weights were not even finite."""
    small, large = Layout(3, 3, has_router=True), Layout(11, 4, has_router=True, has_bias=True)
    layer = make_layer([large], torch.float16, 40, (70,))
    for t in (layer.slots.a, layer.slots.b, layer.slots.bias):
        testing.poison(t)
    held = make_layer([small], torch.float16, 40, (70,)).held
    layer.slots.load(0, held[0])
    layer.held[0] = held[0]
    z, y = random_z(layer, 2), rows(2, 70, torch.float16)
    expected = expected_y(layer, y, z[0], [0, 0])
    layer.expand_(y, z, layer.step([0, 0]))
    assert testing.max_error(y.cpu(), expected) < testing.TOLERANCE[torch.float16]


def test_columns_of_a_wider_tensor() -> None:
    layer = make_layer([LAYOUTS[0], LAYOUTS[1]], torch.float16, out=(40,), all_slices=True)
    wide = rows(5, 40 + 33, torch.float16)
    before, z, ids = wide.clone(), random_z(layer, 5), [0, 1, -1, 1, 0]
    expected = expected_y(layer, wide[:, 30:70], z[0], ids)
    layer.expand_(wide[:, 30:70], z, layer.step(ids))
    assert testing.max_error(wide[:, 30:70].cpu(), expected) < testing.TOLERANCE[torch.float16]
    assert torch.equal(wide[:, :30], before[:, :30])
    assert torch.equal(wide[:, 70:], before[:, 70:])


def test_neighbours_and_repeats_change_nothing() -> None:
    layer = make_layer(LAYOUTS[:3], torch.float16, all_slices=True)
    ids = [i % 3 for i in range(TOKENS)]
    z, y = random_z(layer, TOKENS, 2), rows(TOKENS, sum(OUT), torch.float16)
    first, second = y.clone(), y.clone()
    layer.expand_(first, z, layer.step(ids))
    layer.expand_(second, z, layer.step(ids))
    assert torch.equal(first, second)
    others, alone = random_z(layer, TOKENS, 2, seed=4), y.clone()
    others[:, :, 4] = z[:, :, 4]
    layer.expand_(alone, others, layer.step([ids[4]] * TOKENS))
    assert torch.equal(first[4], alone[4])


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("config", EXPAND_CONFIGS[1:], ids=str)
def test_configurations_agree(dtype: torch.dtype, config: ExpandConfig) -> None:
    """Block sizes change no bit. The interpreter multiplies whole blocks with numpy, whose order is its own."""
    layer = make_layer(LAYOUTS, dtype)
    ids = testing.token_slots("zipf", TOKENS, len(LAYOUTS)).tolist()
    z, y = random_z(layer, TOKENS, 5), rows(TOKENS, sum(OUT), dtype)
    other = y.clone()
    layer.expand_(y, z, layer.step(ids))
    layer.expand_(other, z, layer.step(ids), config)
    assert torch.equal(y, other)
