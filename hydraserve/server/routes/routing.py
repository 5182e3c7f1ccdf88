"""POST /v1/routing: generate, and show how each router mixed the heads for each token."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar, cast

from fastapi import APIRouter, Depends, Request, Response
from starlette.responses import StreamingResponse

from hydraserve.adapters.observation import EngineObservation, RoutingTrace
from hydraserve.errors import BusyError, InvalidRequestError
from hydraserve.server.routing_answer import MAX_BINARY_BYTES, Generated, RoutingAnswer, select, token_texts
from hydraserve.server.routing_schemas import RoutingFormat, RoutingRequest

router = APIRouter(prefix="/v1", tags=["routing"])

# A trace takes memory in the engine's workers for as long as its request runs.
MAX_TRACES = 8
MAX_TOKENS = 4096

CLIENT_CLOSED_REQUEST = 499  # as proxies log it; nobody reads this answer

MEDIA_TYPES = {RoutingFormat.NPZ: "application/x-npz", RoutingFormat.SAFETENSORS: "application/x-safetensors"}

T = TypeVar("T")


class Tracer:
    """Traces requests, a few at a time. engine: see `EngineObservation`."""

    def __init__(self, engine: EngineObservation) -> None:
        self.engine = engine
        self._under_way = 0

    async def trace(self, request: RoutingRequest, state: Any) -> tuple[str, dict[str, Any], RoutingTrace]:
        """(id, vLLM's answer, routing weights). Raises HydraServeError."""
        request_id = f"routing-{uuid.uuid4().hex}"
        limit = min(MAX_TOKENS, self.engine.max_tokens)
        if request.max_tokens > limit:
            raise InvalidRequestError("max_tokens", got=request.max_tokens, expected=f"at most {limit} tokens in all")
        async with self._recording(request_id, limit):
            answer = await self.engine.generate(state, request.completion_body(request_id), request.chat)
            trace = await self.engine.finish_trace(request_id)
        if not trace.routers:
            raise InvalidRequestError(
                "model",
                got=f"{request.model!r}, which has no router",
                expected="an adapter whose heads a router mixes",
                fix="name a HydraLoRA adapter; GET /v1/adapters lists them",
            )
        return request_id, answer, trace

    @asynccontextmanager
    async def _recording(self, request_id: str, limit: int) -> AsyncIterator[None]:
        if self._under_way >= MAX_TRACES:
            raise BusyError(
                "routing",
                got=f"{MAX_TRACES} requests under way",
                expected=f"at most {MAX_TRACES}",
                fix="try again soon",
            )
        self._under_way += 1
        try:
            await self.engine.start_trace(request_id, limit)
            try:
                yield
            except BaseException:
                await asyncio.shield(self.engine.finish_trace(request_id))
                raise
        finally:
            self._under_way -= 1


def tracer(request: Request) -> Tracer:
    return cast(Tracer, request.app.state.hydraserve_tracer)


@router.post("/routing")
async def trace_routing(body: RoutingRequest, request: Request, tracer: Annotated[Tracer, Depends(tracer)]) -> Response:
    """Token by token, prompt and answer: the routing weights of each layer and module, and summaries."""
    work = tracer.trace(body, request.app.state)
    done = await _unless_client_leaves(request, work)
    if done is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    made = await asyncio.to_thread(_answer, body, tracer.engine, *done)
    if body.format is RoutingFormat.JSON:
        made.check_json()
        return StreamingResponse(made.json(), media_type="application/json")
    if made.weights.nbytes > MAX_BINARY_BYTES:
        raise InvalidRequestError(
            "answer",
            got=f"{made.weights.nbytes:,} bytes of routing weights",
            expected=f"at most {MAX_BINARY_BYTES:,}",
            fix="ask for fewer tokens, modules or layers",
        )
    write = made.npz if body.format is RoutingFormat.NPZ else made.safetensors
    return Response(await asyncio.to_thread(write), media_type=MEDIA_TYPES[body.format])


def _answer(
    body: RoutingRequest, engine: EngineObservation, request_id: str, answer: dict[str, Any], trace: RoutingTrace
) -> RoutingAnswer:
    choice = answer["choices"][0]
    prompt_ids = list((answer if body.chat else choice)["prompt_token_ids"])
    token_ids = list(choice["token_ids"])
    if len(prompt_ids) + len(token_ids) - 1 > MAX_TOKENS:
        raise InvalidRequestError(
            "prompt and answer", got=f"{len(prompt_ids)} + {len(token_ids)} tokens", expected=f"at most {MAX_TOKENS}"
        )
    texts = token_texts(engine.decode, prompt_ids + token_ids)
    generated = Generated(prompt_ids, token_ids, texts, choice["finish_reason"])
    return RoutingAnswer(body.model, request_id, generated, select(trace, body.modules, body.layers))


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Do the work, or stop it when nobody waits for it any more; None then."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await doing if doing.done() else None
    finally:
        leaving.cancel()
        doing.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
