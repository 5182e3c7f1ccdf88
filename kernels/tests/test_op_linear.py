"""Triton's shrink and expand as one, against the reference: the delta of a merged linear layer."""

from __future__ import annotations

import pytest
import torch
from hydra_kernels import Layout, StepMetadata, testing
from triton_cases import (
    DEVICE,
    DTYPES,
    EXPAND_CONFIGS,
    GPU,
    IN,
    LAYOUTS,
    OUT,
    SHRINK_CONFIGS,
    TOKENS,
    make_layer,
    needs_triton,
    on_gpu,
    poisoned_memory,
    rows,
)

__all__ = ["poisoned_memory"]
pytestmark = needs_triton


@pytest.mark.parametrize("mix", testing.MIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_linear_matches_reference(mix: str, dtype: torch.dtype) -> None:
    layer = make_layer(LAYOUTS, dtype)
    ids = testing.token_slots(mix, TOKENS, len(LAYOUTS)).tolist()
    x, y = rows(TOKENS, IN, dtype), rows(TOKENS, sum(OUT), dtype, seed=2)
    expected = layer.expected(y, x, ids)
    layer.linear_(y, x, layer.step(ids))
    assert testing.max_error(y.cpu(), expected) < testing.TOLERANCE[dtype]


@pytest.mark.parametrize("configs", list(zip(SHRINK_CONFIGS, EXPAND_CONFIGS, strict=True))[1:], ids=str)
@pytest.mark.parametrize("tokens", [1, 70])
def test_tiles(configs: tuple, tokens: int) -> None:  # type: ignore[type-arg]
    """Tiles of 64, whole and in parts, with one token and with more than one tile of a slot."""
    layer = make_layer([LAYOUTS[0], LAYOUTS[2]], torch.float16, 72, (70,))
    ids = [0 if t < 66 else 1 for t in range(tokens)]
    x, y = rows(tokens, 72, torch.float16), rows(tokens, 70, torch.float16, seed=2)
    expected = layer.expected(y, x, ids)
    layer.linear_(y, x, layer.step(ids), configs)
    assert testing.max_error(y.cpu(), expected) < testing.TOLERANCE[torch.float16]


def test_shrink_then_expand_is_linear() -> None:
    """What row-parallel layers do, with the reduction over ranks between the two: the same bits."""
    n_in = 5 * 512
    layer = make_layer([LAYOUTS[0], LAYOUTS[3]], torch.float16, n_in, (40,))
    x, y, ids = rows(3, n_in, torch.float16), rows(3, 40, torch.float16, seed=2), [1, 0, -1]
    apart, meta = y.clone(), layer.step(ids)
    layer.linear_(y, x, meta)
    layer.expand_(apart, layer.shrink(x, meta), meta)
    assert torch.equal(y, apart)


@pytest.mark.usefixtures("poisoned_memory")
def test_two_ranks_of_a_row_parallel_layer() -> None:
    """Each rank has half the columns of [A; R]; z is summed before the gate."""
    layout = Layout(8, 4, has_router=True, has_bias=True)
    whole = make_layer([layout], torch.float32, 96, (40,))
    x, y, ids = rows(4, 96, torch.float32), rows(4, 40, torch.float32, seed=2), [0, -1, 0, 0]
    expected = whole.expected(y, x, ids)
    z = torch.zeros((), device=DEVICE)
    for rank in range(2):
        columns = slice(48 * rank, 48 * rank + 48)
        part = make_layer([layout], torch.float32, 48, (40,))
        part.slots.load(0, [whole.held[0][0].shard(columns=columns)])  # type: ignore[union-attr]
        z = z + part.shrink(x[:, columns].contiguous(), part.step(ids))
    whole.expand_(y, z, whole.step(ids))
    assert testing.max_error(y.cpu(), expected) < testing.TOLERANCE[torch.float32]


def test_more_rows_than_the_step_has_tokens() -> None:
    """Rows beyond the step's tokens (a padded batch) are not touched."""
    layer = make_layer(LAYOUTS[:2], torch.float32)
    meta = StepMetadata(16, 2, DEVICE)
    meta.update([0, 1, 0])
    x, y = rows(7, IN, torch.float32), rows(7, sum(OUT), torch.float32, seed=2)
    expected = layer.expected(y, x, [0, 1, 0, -1, -1, -1, -1])
    layer.linear_(y, x, meta)
    assert testing.max_error(y.cpu(), expected) < testing.TOLERANCE[torch.float32]


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    """Alone, in a decode batch, and in a prefill of thousands: other tiles, splits and blocks, not another result."""
    n_in, out, last = 4096, (4096, 1024, 1024), 5000
    layer = make_layer([LAYOUTS[0], LAYOUTS[2], Layout(16, 8, has_router=True)], dtype, n_in, out, all_slices=True)
    x, y = rows(last, n_in, dtype), rows(last, sum(out), dtype, seed=2)
    ids = testing.token_slots("uniform", last, 3).tolist()
    seen = []
    for tokens in (1, 7, 64, 600, last):
        part = y[-tokens:].clone()
        layer.slots.linear_(part, x[-tokens:].contiguous(), layer.step(ids[-tokens:]))
        seen.append(part[-1])
    for other in seen[1:]:
        assert torch.equal(seen[0], other)


@on_gpu
@pytest.mark.parametrize("tokens", [8, 600])
def test_graph_replay_equals_eager(tokens: int) -> None:
    """Captured once with one mix, replayed with every other, none included."""
    layer = make_layer(LAYOUTS, torch.float16)
    x, y = rows(tokens, IN, torch.float16), rows(tokens, sum(OUT), torch.float16, seed=2)
    meta = layer.step(testing.token_slots("identical", tokens, len(LAYOUTS)).tolist())
    captured = y.clone()
    layer.slots.linear_(captured, x, meta)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.slots.linear_(captured, x, meta)
    for mix in testing.MIXES:
        meta.update(testing.token_slots(mix, tokens, len(LAYOUTS)))
        captured.copy_(y)
        graph.replay()
        eager = y.clone()
        layer.slots.linear_(eager, x, meta)
        assert torch.equal(captured, eager), mix


@on_gpu
def test_no_launch_waits_for_the_gpu() -> None:
    """A step without adapters launches nothing; one with adapters never synchronises."""
    layer = make_layer(LAYOUTS, torch.float16)
    x, y = rows(TOKENS, IN, torch.float16), rows(TOKENS, sum(OUT), torch.float16, seed=2)
    meta = layer.step(testing.token_slots("uniform", TOKENS, len(LAYOUTS)).tolist())
    layer.slots.linear_(y, x, meta)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.slots.linear_(y, x, meta)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mix, launches in (("uniform", 2), ("none", 0)):
        meta.update(testing.token_slots(mix, TOKENS, len(LAYOUTS)))
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            layer.slots.linear_(y, x, meta)
            torch.cuda.synchronize()
        kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) == launches, kernels


@on_gpu
@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] < 9, reason="needs a Hopper GPU or a newer one")
def test_programmatic_dependent_launch() -> None:
    """With the early start of expand, many pairs in a row give the same bits as without."""
    from dataclasses import replace

    from hydra_kernels.ops.shrink import shrink_partials
    from hydra_kernels.slots import meta_args

    layer = make_layer(LAYOUTS, torch.float16)
    x, y = rows(TOKENS, IN, torch.float16), rows(TOKENS, sum(OUT), torch.float16, seed=2)
    meta, other = layer.step(testing.token_slots("uniform", TOKENS, len(LAYOUTS)).tolist()), y.clone()
    for _ in range(20):
        layer.linear_(y, x, meta)
        z = shrink_partials(x, layer.slots.a, layer.slots.layout, *meta_args(meta), SHRINK_CONFIGS[0], pdl=True)
        layer.expand_(other, z, meta, replace(EXPAND_CONFIGS[0], pdl=True))
    assert torch.equal(y, other)
