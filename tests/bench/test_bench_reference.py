"""The authors' computation against the kernels' reference, and its process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra_kernels import HydraWeights, Layout
from hydra_kernels.reference import delta
from hydra_kernels.testing import random_weights

from hydraserve.adapters.synthetic import make_adapter, save_adapter
from hydraserve.bench.arms import BASE, Plan, Shape, compare
from hydraserve.bench.reference import PerHeadLinear, PerHeadModel, build
from hydraserve.bench.targets import ReferenceTarget
from hydraserve.bench.workload import Load, Request
from hydraserve.errors import EngineError
from hydraserve.models import base_shapes

LAYOUTS = {"hydra": Layout(4, 3, has_router=True), "one-head": Layout(8, 1, has_router=True), "plain": Layout(8)}


def layer(adapters: dict[str, HydraWeights]) -> PerHeadLinear:
    base = torch.nn.Linear(24, 20)
    return PerHeadLinear(base, adapters)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layer_is_the_base_and_the_delta(kind: str) -> None:
    weights = random_weights(24, 20, LAYOUTS[kind], torch.float32)
    made = layer({"a": weights})
    x = torch.randn(2, 5, 24)
    assert torch.equal(made(x), made.base(x))
    made.active = "a"
    expected = made.base(x) + delta(x.reshape(-1, 24), weights).view(2, 5, 20)
    torch.testing.assert_close(made(x), expected, atol=1e-5, rtol=1e-5)
    made.active = "another, which this layer does not have"
    assert torch.equal(made(x), made.base(x))


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed in range(2):
        adapter = make_adapter(base_shapes(str(tiny_llama)), ("q_proj", "down_proj"), 4, 3, seed)
        save_adapter(adapter, folder / f"a{seed}")
    return {f"a{seed}": folder / f"a{seed}" for seed in range(2)}


def test_every_adapted_layer_of_a_model_is_replaced(tiny_llama: Path, adapters: dict[str, Path]) -> None:
    model = PerHeadModel(str(tiny_llama), adapters, torch.float32)
    assert len(model.layers) == 4  # two modules in each of two layers
    ids = torch.arange(3, 11).view(1, -1)
    logits = {}
    for name in (None, "a0", "a1"):
        model.select(name)
        with torch.inference_mode():
            logits[name] = model.model(ids).logits
    assert not torch.allclose(logits[None], logits["a0"], atol=1e-3)
    assert not torch.allclose(logits["a0"], logits["a1"], atol=1e-3)


def test_generate_tells_when_each_token_came(tiny_llama: Path, adapters: dict[str, Path]) -> None:
    model = PerHeadModel(str(tiny_llama), adapters)
    model.select("a0")
    times = model.generate(torch.arange(3, 19).view(2, 8), 6)
    assert len(times) == 6
    assert times == sorted(times)


def test_process_answers_group_by_group(tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    requests = [Request(model, (3, 4, 5), 4) for model in ("a0", "a1", "a0", BASE)]
    done: list[None] = []
    with ReferenceTarget(["--model", str(tiny_llama)], adapters, tmp_path / "log") as target:
        records = target.run(requests, Load(concurrency=4), lambda: done.append(None))
        assert target.leader is not None
    assert len(done) == 4
    assert [record.model for record in records] == ["a0", "a0", "a1", BASE]
    assert all(record.output_tokens == 4 and record.error is None for record in records)
    assert records[0].tokens == records[1].tokens, "the requests of one adapter are one batch"
    assert records[0].end < records[2].tokens[0][0], "the next adapter waits"
    assert records[2].start == records[0].start, "and its requests wait with it"


@pytest.mark.parametrize(
    ("name", "dtype"), [("auto", torch.bfloat16), ("float32", torch.float32), ("half", torch.float16)]
)
def test_it_computes_in_the_dtype_of_the_servers(
    name: str, dtype: torch.dtype, tiny_llama: Path, tmp_path: Path
) -> None:
    """They could not be compared otherwise: in float32 twice the bytes are read."""
    model = str(tiny_llama)
    plan = Plan(
        model=model,
        base_shapes=base_shapes(model),
        shapes=[Shape(4, 2)],
        counts=[1],
        kinds=["reference"],
        engine_flags=[],
        vllm_rank=lambda rank: rank,
        folder=tmp_path,
        dtype=name,
    )
    (server,) = compare(plan).servers
    assert build(server.arguments).model.dtype == dtype


def test_a_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="nowhere"), ReferenceTarget(["--model", "./nowhere"], {}, tmp_path / "log"):
        pass
