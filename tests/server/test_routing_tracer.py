"""What POST /v1/routing refuses before anything is computed, and that a trace ends whatever becomes of its request."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hydraserve.adapters.observation import RoutingTrace
from hydraserve.adapters.store import AdapterStore
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.errors import BusyError, InvalidRequestError, UnknownAdapterError
from hydraserve.server.lifecycle.served import ServedAdapter
from hydraserve.server.routes.routing import MAX_TOKENS, MAX_TRACE_BYTES, MAX_TRACES, Tracer
from hydraserve.server.routing_schemas import RoutingRequest

LAYERS, HEADS = 2, 3
SHAPES = {f"model.layers.{i}.self_attn.q_proj": (16, 16) for i in range(LAYERS)}


class Engine:
    """`EngineObservation`, as far as tracing asks it: one token for each character of a prompt."""

    def __init__(self) -> None:
        self.max_tokens = 10 * MAX_TOKENS
        self.traces: dict[str, int] = {}
        self.begins = asyncio.Event()
        self.generates = asyncio.Event()
        self.generated = 0

    async def count_prompt(self, state: Any, body: Mapping[str, Any], chat: bool) -> int:
        if body["model"] == "nobody":
            raise UnknownAdapterError("nobody")
        return len(body["prompt"])

    async def start_trace(self, trace: str, limit: int) -> None:
        self.traces[trace] = limit
        await self.begins.wait()

    async def finish_trace(self, trace: str) -> RoutingTrace:
        self.traces.pop(trace, None)
        return RoutingTrace(tuple(SHAPES), (HEADS,) * LAYERS, np.ones((1, LAYERS, HEADS), dtype=np.float32))

    async def generate(self, state: Any, body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
        self.generated += 1
        await self.generates.wait()
        return {}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServedAdapter]:
    """Stored adapters: one with routers, and a plain LoRA."""
    folder = tmp_path_factory.mktemp("store")
    store, found = AdapterStore(folder), {}
    for adapter_id, (name, heads) in enumerate({"sql": HEADS, "plain": 1}.items()):
        stored = store.add(make_adapter(SHAPES, ("q_proj",), 2, heads, seed=adapter_id))
        found[name] = ServedAdapter(name, stored, adapter_id, SimpleNamespace())
    return found


def ask(prompt: str = "x", **fields: Any) -> RoutingRequest:
    return RoutingRequest(**{"model": "sql", "prompt": prompt, "max_tokens": 1, **fields})


REFUSED: dict[str, tuple[RoutingRequest, str]] = {
    "too many tokens": (ask("x" * MAX_TOKENS), f"at most {MAX_TOKENS}"),
    "no router": (ask(model="plain"), "no router"),
    "base model": (ask(model="base"), "no router"),
    "module": (ask(modules=["up_proj"]), "q_proj"),
    "layer": (ask(layers=[LAYERS]), "0, 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_refused_before_it_is_computed(name: str, served: dict[str, ServedAdapter]) -> None:
    request, words = REFUSED[name]

    async def scenario() -> Engine:
        engine = Engine()
        with pytest.raises(InvalidRequestError, match=words):
            await Tracer(engine, served, 1).trace(request, None)  # type: ignore[arg-type]
        return engine

    engine = asyncio.run(scenario())
    assert (engine.traces, engine.generated) == ({}, 0)
    assert not any(adapter.in_use for adapter in served.values())


def test_memory_of_all_traces_together_is_limited(served: dict[str, ServedAdapter]) -> None:
    async def scenario() -> None:
        engine = Engine()
        engine.begins.set()
        tracer = Tracer(engine, served, MAX_TRACE_BYTES // 100)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="at most 100 tokens"):
            await tracer.trace(ask("x" * 100), None)
        first = asyncio.create_task(tracer.trace(ask("x" * 59), None))
        while not engine.generated:
            await asyncio.sleep(0)
        with pytest.raises(BusyError, match="bytes with this one"):
            await tracer.trace(ask("x" * 59), None)
        second = asyncio.create_task(tracer.trace(ask("x" * 39), None))
        engine.generates.set()
        await asyncio.gather(first, second)
        await tracer.trace(ask("x" * 99), None)

    asyncio.run(scenario())


def test_a_trace_is_as_long_as_prompt_and_answer(served: dict[str, ServedAdapter]) -> None:
    async def scenario() -> None:
        engine = Engine()
        engine.begins.set()
        tracing = asyncio.create_task(Tracer(engine, served, 1).trace(ask("x" * 5, max_tokens=7), None))  # type: ignore[arg-type]
        while not engine.generated:
            await asyncio.sleep(0)
        assert list(engine.traces.values()) == [12]
        engine.generates.set()
        await tracing
        assert engine.traces == {}

    asyncio.run(scenario())


@pytest.mark.parametrize("begun", [False, True], ids=["while the trace begins", "while it generates"])
def test_who_leaves_leaves_no_trace(begun: bool, served: dict[str, ServedAdapter]) -> None:
    async def scenario() -> None:
        engine = Engine()
        if begun:
            engine.begins.set()
        tracer = Tracer(engine, served, 1)  # type: ignore[arg-type]
        for _ in range(2 * MAX_TRACES):
            tracing = asyncio.create_task(tracer.trace(ask(), None))
            while len(engine.traces) == 0 or (begun and not engine.generated):
                await asyncio.sleep(0)
            tracing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await tracing
            assert engine.traces == {}

    asyncio.run(scenario())
