"""The planner's arithmetic against what the kernels' slots and the loaders really hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra_kernels import HydraWeights, Layout, SlotCapacity
from hydra_kernels.ops import cpu
from hydra_kernels.slots import StackedSlots
from hydra_kernels.testing import capacity_for, random_weights

from hydraserve.adapters.synthetic import make_adapter
from hydraserve.bench.capacity import (
    GIB,
    BaseSize,
    MemoryPlan,
    Wish,
    adapter_bytes,
    context_length,
    kv_bytes_per_token,
    packed_slot_bytes,
    stacked_slot_bytes,
    with_merged_partners,
)
from hydraserve.errors import ConfigError
from hydraserve.models import base_shapes
from hydraserve.models.memory import weight_bytes

# SmolLM2-135M's layer; its sizes are no powers of two.
SHAPES = {
    "l.q_proj": (576, 576),
    "l.k_proj": (576, 192),
    "l.v_proj": (576, 192),
    "l.o_proj": (576, 576),
    "l.gate_proj": (576, 1536),
    "l.up_proj": (576, 1536),
    "l.down_proj": (1536, 576),
}
LAYERS = (("l.q_proj", "l.k_proj", "l.v_proj"), ("l.o_proj",), ("l.gate_proj", "l.up_proj"), ("l.down_proj",))
LAYOUTS = (Layout(8, 4, has_router=True), Layout(16, 8, has_router=True), Layout(5, 3, has_router=True), Layout(32))


def weights(layout: Layout, dtype: torch.dtype) -> dict[str, HydraWeights]:
    return {path: random_weights(n_in, out, layout, dtype) for path, (n_in, out) in SHAPES.items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_adapter_bytes_are_exact(layout: Layout) -> None:
    made = make_adapter(SHAPES, None, layout.rank, layout.heads, dtype=torch.bfloat16)
    assert adapter_bytes(SHAPES.values(), layout, 2) == made.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_slots_are_planned_within_two_percent(layout: Layout, dtype: torch.dtype) -> None:
    if not cpu.available(dtype):
        pytest.skip("no compiler for the native CPU operator here, so there are no packed slots")
    held = 0
    parts = weights(layout, dtype)
    for layer in LAYERS:
        slots = cpu.PackedSlots(1, SHAPES[layer[0]][0], [SHAPES[p][1] for p in layer], capacity_for([layout]), dtype)
        slots.load(0, [parts[path] for path in layer])
        held += slots.nbytes
    assert packed_slot_bytes(SHAPES.values(), layout, dtype.itemsize) == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_stacked_slots_are_planned_exactly(layout: Layout, dtype: torch.dtype) -> None:
    capacity = SlotCapacity(layout.rank + layout.heads, layout.k, layout.heads)
    held = sum(
        StackedSlots(3, SHAPES[layer[0]][0], [SHAPES[p][1] for p in layer], capacity, dtype, "cpu").nbytes
        for layer in LAYERS
    )
    assert 3 * stacked_slot_bytes(SHAPES, capacity, dtype.itemsize) == held


def test_tensor_parallel_ranks_share_a_slot() -> None:
    capacity = SlotCapacity(12, 32, 4)
    # [A; R] is whole where the output is split, its columns are split where the input is; B's rows always are.
    whole = sum(12 * n_in for path, (n_in, _) in SHAPES.items() if "o_proj" not in path and "down" not in path)
    split = (12 * (576 + 1536) + 32 * sum(out for _, out in SHAPES.values())) // 2
    small = 4 * (8 + 4) * len(SHAPES)
    assert stacked_slot_bytes(SHAPES, capacity, 2, tensor_parallel=2) == 2 * (whole + split) + small


def test_merged_layers_come_whole() -> None:
    assert with_merged_partners(["q_proj"], SHAPES) == {"q_proj", "k_proj", "v_proj"}
    assert with_merged_partners(["o_proj", "up_proj"], SHAPES) == {"o_proj", "gate_proj", "up_proj"}
    assert with_merged_partners(["q_proj"], {"l.q_proj": (8, 8)}) == {"q_proj"}


def test_kv_bytes_of_known_models() -> None:
    from transformers import LlamaConfig

    llama2_7b = LlamaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, hidden_size=4096)
    llama3_8b = LlamaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
    assert kv_bytes_per_token(llama2_7b, 2) == 512 * 1024
    assert kv_bytes_per_token(llama3_8b, 2) == 128 * 1024
    assert kv_bytes_per_token(llama3_8b, 2, tensor_parallel=4) == 32 * 1024
    assert kv_bytes_per_token(llama3_8b, 2, tensor_parallel=16) == 128 * 1024 // 8, "a head is never split"


def test_base_size_is_read_from_the_checkpoint(tiny_llama: Path) -> None:
    size = BaseSize.of(str(tiny_llama), 2)
    assert size.weights == weight_bytes(str(tiny_llama))
    assert BaseSize.of(str(tiny_llama), 4).weights == 2 * size.weights
    config = json.loads((tiny_llama / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    assert size.context == config["max_position_embeddings"]
    assert size.kv_token == 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 2
    assert set(size.shapes) == {path for path in base_shapes(str(tiny_llama)) if "lm_head" not in path}


LAYERS_32 = {f"{i}.{p}": s for i in range(32) for p, s in SHAPES.items()}
BASE = BaseSize(10 * GIB, 1 << 17, LAYERS_32, hidden=4096, intermediate=14336, vocabulary=32000, context=4096)


def plan(**changes: Any) -> MemoryPlan:
    wish: Mapping[str, Any] = {
        "layout": Layout(8, 4, has_router=True),
        "adapters": 1000,
        "device": "gpu",
        "memory": 80 * GIB,
        "host": 64 * GIB,
    }
    return MemoryPlan(BASE, Wish(**{**wish, **changes}))


def test_everything_of_a_gpu_is_accounted_for() -> None:
    made = plan()
    assert made.total == pytest.approx(0.9 * 80 * GIB, abs=1)
    assert made.slots == 64, "no more than requests at one time"
    assert made.max_adapters == 1000
    assert made.kv_tokens * made.kv_token <= made.kv_cache
    assert made.kv_cache - made.kv_tokens * made.kv_token < 16 * made.kv_token
    assert made.flags()[:8] == ["--slots", "64", "--max-adapters", "1000", "--max-rank", "8", "--max-heads", "4"]
    assert made.flags()[-2:] == ["--gpu-memory-utilization", "0.9"]


def test_slots_give_way_to_the_kv_cache() -> None:
    small = plan(memory=14 * GIB)
    assert 1 <= small.slots < 64
    assert small.slots * small.slot <= 0.25 * small.left < (small.slots + 1) * small.slot
    assert plan(memory=14 * GIB, slots=60).slots == 60, "unless they were asked for"


def test_waiting_adapters_give_way_to_the_memory() -> None:
    small = plan(host=4 * GIB)
    assert small.max_adapters * small.adapter <= 2 * GIB < (small.max_adapters + 1) * small.adapter
    cpu_plan = plan(device="cpu", memory=16 * GIB, utilization=0.9)
    assert cpu_plan.max_adapters < 1000
    assert cpu_plan.total == pytest.approx(0.9 * 16 * GIB, abs=1), "on a CPU they wait in the same memory"
    assert cpu_plan.flags()[-2:] == ["--kv-cache-memory-bytes", str(cpu_plan.kv_cache)]


def test_each_rank_keeps_its_own_copy_of_a_waiting_adapter() -> None:
    one, eight = plan(host=64 * GIB), plan(host=64 * GIB, tensor_parallel=8)
    assert one.waiting == one.adapter == eight.adapter
    assert eight.waiting == 8 * eight.adapter
    tight = plan(host=24 * GIB, tensor_parallel=8)
    assert tight.max_adapters * 8 * tight.adapter <= 12 * GIB < (tight.max_adapters + 1) * 8 * tight.adapter
    assert tight.host_cache == tight.max_adapters * tight.waiting


def test_one_request_of_the_longest_length_has_to_fit() -> None:
    for length in (None, 4096, 512):
        made = plan(memory=18 * GIB, max_model_len=length)
        assert made.max_model_len == (length or 4096), "the model's context"
        assert made.requests == pytest.approx(made.kv_tokens / made.max_model_len)
        assert made.fits is (made.kv_tokens >= made.max_model_len)
    short = next(p for m in range(200) if (p := plan(memory=13 * GIB + m * GIB // 20)).kv_tokens)
    assert 0 < short.kv_tokens < 4096
    assert not short.fits
    assert plan(memory=short.wish.memory, max_model_len=short.kv_tokens).fits
    assert "--max-model-len 512" in " ".join(plan(max_model_len=512).flags())
    assert "--max-model-len" not in plan().flags(), "vLLM's default is the context too"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"targets": ("qproj",)}, r"qproj.*down_proj, gate_proj"),
        ({"max_model_len": 4097}, "--max-model-len"),
        ({"device": "cpu", "tensor_parallel": 2}, "--tensor-parallel-size"),
    ],
)
def test_what_would_not_run_is_refused(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        plan(**changes)


def test_context_is_what_vllm_takes_it_for() -> None:
    from transformers import LlamaConfig

    stretched = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    inside = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}
    assert context_length(LlamaConfig(max_position_embeddings=1024)) == 1024
    assert context_length(LlamaConfig(max_position_embeddings=1024, rope_parameters=stretched)) == 4096
    assert context_length(LlamaConfig(max_position_embeddings=1024, rope_parameters=inside)) == 1024


def test_what_does_not_fit_has_no_kv_cache() -> None:
    assert plan(memory=10 * GIB).kv_tokens == 0
    assert plan(memory=10 * GIB).slots == 1
    assert plan(slots=5000).kv_tokens == 0


def test_fewer_modules_make_smaller_slots() -> None:
    mlp = plan(targets=("gate_proj", "up_proj", "down_proj"))
    assert mlp.slot < plan().slot
    assert mlp.adapter < plan().adapter
    # q_proj alone has a slot as large as q, k and v together on a GPU, and its own size on a CPU
    query, all_three = plan(targets=("q_proj",)), plan(targets=("q_proj", "k_proj", "v_proj"))
    assert query.slot == all_three.slot
    assert query.adapter < all_three.adapter
    assert "--target-modules q_proj" in " ".join(query.flags())
    on_cpu = {"device": "cpu", "memory": 64 * GIB}
    assert plan(targets=("q_proj",), **on_cpu).slot < plan(targets=("q_proj", "k_proj"), **on_cpu).slot
