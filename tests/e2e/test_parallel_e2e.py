"""Tensor, pipeline and data parallel, with adapters on all modules: the tokens, counts and traces of one process.

Tensor parallel runs the model compiled, as is the default, the others do not: what both compute is the same, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from adapter_client import AdapterClient, wait_for
from engines import ENGINE_ENV
from family import shared_routers
from prometheus_client.parser import text_string_to_metric_families

from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.bench.process import ServerProcess
from hydraserve.models import base_shapes

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = {"hydra-r4-e3": (4, 3), "hydra-r8-e2": (8, 2), "plain-r4": (4, 1)}
SHARED = "shared-router"  # of gate, up and down: the logits that down takes are not reduced over ranks, its z is
LATE = {"late-r8-e2": (8, 2), "late-plain": (4, 1), "late-r4-e3": (4, 3)}  # what "late" is, one after the other
ROUTED = ("hydra-r4-e3", "hydra-r8-e2")
LAYERS, PROMPT, GENERATED = 2, 6, 20

COUNTED_ADAPTERS = {*ADAPTERS, SHARED, "late"}  # of those that the one process serves to other tests, too

Greedy = Callable[[str], list[int]]  # model -> the tokens that it answers


@dataclass(frozen=True)
class Found:
    """tokens: greedy ones of every model. routers: each router series' labels -> its value, after these requests.
    traced: adapter -> layers and modules that POST /v1/routing shows for it, each with its mean weights.
    late: what an adapter that came and went while the server ran was -> its tokens. loaded: its router series."""

    tokens: Mapping[str, list[int]]
    routers: Mapping[str, float]
    traced: Mapping[str, Mapping[str, list[float]]]
    late: Mapping[str, list[int]]
    loaded: Mapping[str, float]


def router_series(url: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text)
    samples = [s for family in families for s in family.samples if s.name.startswith("hydraserve_router_")]
    counters = [s for s in samples if s.name.endswith("_total") and s.labels.get("adapter") in COUNTED_ADAPTERS]
    return {f"{s.name} {sorted(s.labels.items())}": s.value for s in counters}


COUNTED = f"hydraserve_router_tokens_total {sorted({'adapter': 'ADAPTER', 'module': 'up_proj'}.items())}"
AT_ONCE = 4  # the same request: with two engines, both get some


def wait_for_counts(url: str, adapters: Iterable[str], requests: int) -> dict[str, float]:
    """Every router series, when all tokens of so many requests to each of the adapters are counted."""
    wanted, tokens = [COUNTED.replace("ADAPTER", name) for name in adapters], LAYERS * (PROMPT + GENERATED - 1)

    def counted() -> bool:
        series = router_series(url)
        return all(series.get(name, 0) >= tokens * requests for name in wanted)

    wait_for(counted, "the counts")
    return router_series(url)


def come_and_go(
    url: str, adapters: Path, tokens: Mapping[str, list[int]], greedy: Greedy
) -> tuple[dict[str, list[int]], dict[str, float]]:
    """Load, replace, unload and load an adapter anew, in a place that others have as well; the tokens of each of these,
    and the router series after the first."""
    client, late = AdapterClient(url), {}

    def ask(source: str) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            late[source], *others = pool.map(greedy, ["late"] * AT_ONCE)
        assert others == [late[source]] * (AT_ONCE - 1), source

    first, second, third = LATE
    client.add("late", adapters / first)
    ask(first)
    counted = wait_for_counts(url, ["late"], AT_ONCE)
    client.replace("late", adapters / second)
    ask(second)
    client.remove("late")
    assert client.complete("late", [5], 1).status == 404
    client.add("late", adapters / third)
    ask(third)
    assert "late" in client.list()["residency"]["slots"]
    client.remove("late")
    assert "late" not in client.list()["residency"]["slots"]
    assert {model: greedy(model) for model in tokens} == tokens, "and the others are as they were"
    return late, {name: value for name, value in counted.items() if "'late'" in name}


def traced(url: str, adapter: str) -> dict[str, list[float]]:
    body = {"model": adapter, "prompt": [5, 17, 42, 7, 99, 23], "max_tokens": 6, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/routing", json=body, timeout=60).raise_for_status().json()
    seen = [token["weights"] for token in answer["tokens"] if token["weights"]]
    return {
        router["name"]: [sum(weights[i][head] for weights in seen) / len(seen) for head in range(router["heads"])]
        for i, router in enumerate(answer["routers"])
    }


def found(url: str, adapters: Path) -> Found:
    """What a server with ADAPTERS and the shared router answers, counts and traces."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)

    def greedy(model: str) -> list[int]:
        answer = client.completions.create(
            model=model,
            prompt=[5, 17, 42, 7, 99, 23],
            max_tokens=GENERATED,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]

    with ThreadPoolExecutor(4) as pool:
        models = ["tiny", *ADAPTERS, SHARED]
        tokens = dict(zip(models, pool.map(greedy, models), strict=True))
    routers = wait_for_counts(url, [*ROUTED, SHARED], 1)
    traces = {name: traced(url, name) for name in ROUTED}
    return Found(tokens, routers, traces, *come_and_go(url, adapters, tokens, greedy))


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tiny_made: Path) -> Path:
    folder = tiny_made
    shapes = base_shapes(str(tiny_llama))
    # Contents of their own: counts of one that `tiny_adapters` has too would be shown under the name used most.
    for seed, (name, (rank, heads)) in enumerate((ADAPTERS | LATE).items(), 100):
        save_adapter(make_adapter(shapes, TARGETS, rank, heads, seed=seed), folder / name)
    shared_routers(shapes, dense=True, seed=9).write(folder / SHARED)
    return folder


@pytest.fixture(scope="module")
def single(tiny_server: ServerProcess, adapters: Path) -> Found:
    client = AdapterClient(tiny_server.url)
    for name in (*ADAPTERS, SHARED):
        client.add(name, adapters / name)
    one = found(tiny_server.url, adapters)
    for name in (*ADAPTERS, SHARED):
        client.remove(name)
    routed = [value for name, value in one.routers.items() if "router_tokens" in name]
    series = len(TARGETS) * len(ROUTED) + 2  # of the shared routers, those of gate and up: down has none
    assert routed == [LAYERS * (PROMPT + GENERATED - 1)] * series
    assert len({tuple(tokens) for tokens in (*one.tokens.values(), *one.late.values())}) == len(one.tokens) + len(LATE)
    loaded = [value for name, value in one.loaded.items() if "router_tokens" in name]
    assert loaded == [LAYERS * (PROMPT + GENERATED - 1) * AT_ONCE] * len(TARGETS)
    return one


# Data parallel with as many API server processes as engines: any of these may send a request to any of those.
KINDS = {
    "tensor": ["--tensor-parallel-size", "2"],
    "pipeline": ["--pipeline-parallel-size", "2", "--enforce-eager"],
    "data": ["--data-parallel-size", "2", "--api-server-count", "2", "--enforce-eager"],
}


@pytest.mark.parametrize("kind", ["tensor", *(pytest.param(k, marks=pytest.mark.long) for k in ("pipeline", "data"))])
def test_two_equal_one(kind: str, tiny_llama: Path, adapters: Path, single: Found, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_llama), "--served-model-name", "tiny", "--dtype", "float32", *KINDS[kind]]
    arguments += ["--max-model-len", "128", "--max-num-seqs", "8", "--router-metrics", "on"]
    arguments += ["--allow-source", str(adapters)]
    for name in (*ADAPTERS, SHARED):
        arguments += ["--adapter", f"{name}={adapters / name}"]
    env = {**ENGINE_ENV, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with ServerProcess(arguments, tmp_path / "log", env) as server:
        two = found(server.url, adapters)
    assert (two.tokens, two.late) == (single.tokens, single.late)
    assert two.routers == pytest.approx(single.routers, rel=1e-4), "nothing is counted twice, and nothing is left out"
    assert two.loaded == pytest.approx(single.loaded, rel=1e-4), "nor of an adapter that came later"
    for adapter, routers in single.traced.items():
        assert list(two.traced[adapter]) == list(routers), "in the order of the layers"
        for name, weights in routers.items():
            assert two.traced[adapter][name] == pytest.approx(weights, abs=1e-4), name
