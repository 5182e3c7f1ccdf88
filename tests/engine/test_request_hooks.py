"""What is done around a request on its way into vLLM's engine, over an engine that only keeps books."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

import pytest
from vllm import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from hydraserve.engine import compat
from hydraserve.engine.client import EngineAdapters, add_request, generate, salted
from hydraserve.errors import InvalidRequestError


class Hooks:
    """Lets requests in one step after they came."""

    async def ready(self, model: str) -> None: ...

    @asynccontextmanager
    async def admit(self, adapter_id: int, adapter: str, request_id: str) -> AsyncIterator[None]:
        await asyncio.sleep(0)
        yield

    def cache_salt(self) -> str | None:
        return "5a17"


class FakeEngine:
    """Takes its time until it knows a request. prompts: as they came; aborted: ids that it knew."""

    def __init__(self) -> None:
        self.hydra_adapters = EngineAdapters(self)
        self.hydra_adapters.hooks = Hooks()
        self.known: set[str] = set()
        self.aborted: list[str] = []
        self.prompts: list[Any] = []

    async def add_request(self, request_id: str, prompt: Any) -> list[str]:
        self.prompts.append(prompt)
        await asyncio.sleep(0)
        self.known.add(request_id)
        return ["first", "last"]

    async def abort(self, request_ids: str | list[str]) -> None:
        ids = [request_ids] if isinstance(request_ids, str) else request_ids
        self.aborted += self.known.intersection(ids)

    async def original(self, prompt: Any, params: Any, request_id: str, **_: Any) -> AsyncGenerator[str, None]:
        for output in await add_request(FakeEngine.add_request, self, request_id, prompt):
            yield output

    async def run(self, prompt: Any, request_id: str) -> list[str]:
        adapter = self.hydra_adapters.request("a@1", 1, "/x")
        return [o async for o in generate(FakeEngine.original, self, prompt, None, request_id, adapter)]


@pytest.mark.parametrize("steps", [1, 2])
def test_an_abort_reaches_a_request_that_is_on_its_way(steps: int) -> None:
    async def run() -> None:
        engine = FakeEngine()
        request = asyncio.create_task(engine.run({"prompt": "?"}, "r1"))
        for _ in range(steps):
            await asyncio.sleep(0)
        assert not request.done()
        await engine.hydra_adapters.abort(["r1", "somebody-else's"])
        await request
        assert "r1" in engine.aborted
        await engine.run({"prompt": "?"}, "r1")
        assert engine.aborted.count("r1") == 1, "another request of this name is not the same request"

    asyncio.run(run())


def test_the_senders_salt_is_in_every_prompt() -> None:
    async def run() -> None:
        engine = FakeEngine()
        await engine.run({"prompt": "?", "cache_salt": "own"}, "r1")
        assert engine.prompts == [{"prompt": "?", "cache_salt": "5a17:own"}]

        async def parts() -> AsyncGenerator[str, None]:
            yield "?"

        for prompt in ("?", parts()):
            with pytest.raises(InvalidRequestError, match="prefix cache"):
                await engine.run(prompt, "r2")

    asyncio.run(run())


def test_what_a_client_gives_is_never_the_salt_of_a_key() -> None:
    isolated = salted({"prompt": "?"}, "5a17")["cache_salt"]
    for own in (isolated, "5a17", "5a17:", "-:5a17:"):
        assert salted({"prompt": "?", "cache_salt": own}, None)["cache_salt"] != isolated
        assert salted({"prompt": "?", "cache_salt": own}, "ab")["cache_salt"] != isolated
    again = [salted({"prompt": "?", "cache_salt": "x"}, None) for _ in range(2)]
    assert again[0] == again[1], "a client's own salt still finds its own blocks"
    assert salted({"prompt": "?"}, None) == {"prompt": "?"}
    assert salted("?", None) == "?"
    inner = salted({"type": "enc_dec", "encoder_prompt": {}, "decoder_prompt": {"prompt": "?"}}, "5a17")
    assert inner["decoder_prompt"]["cache_salt"] == isolated


def test_vllms_engine_goes_through_the_hooks() -> None:
    compat.apply()
    engine = object.__new__(AsyncLLM)
    engine.engine_core = Mock(**{"resources.engine_dead": True})
    engine.log_requests = False
    hooks = engine.hydra_adapters.hooks = Mock(**{"cache_salt.return_value": None})
    seen: list[bool] = []
    hooks.admit.side_effect = lambda *_: seen_by(lambda: seen.append("r1" in engine.hydra_adapters._entered))

    async def run() -> None:
        with pytest.raises(EngineDeadError):
            await engine.add_request("r1", {"type": "token", "prompt_token_ids": [1]}, SamplingParams())
        request = engine.hydra_adapters.request("a@1", 1, "/x")
        prompt = {"type": "token", "prompt_token_ids": [1]}
        with pytest.raises(EngineDeadError):
            await anext(engine.generate(prompt, SamplingParams(), "r1", lora_request=request))
        assert hooks.admit.call_args.args == (1, "a@1", "r1")
        assert seen == [True]
        assert not engine.hydra_adapters.is_to_end("r1")

    asyncio.run(run())


@asynccontextmanager
async def seen_by(note: Callable[[], None]) -> AsyncIterator[None]:
    note()
    yield
