"""POST /v1/routing: generate, and show how each router mixed the heads for each token."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar, cast

from fastapi import APIRouter, Depends, Request, Response
from starlette.responses import StreamingResponse

from hydraserve.adapters.observation import EngineObservation, RoutingTrace
from hydraserve.adapters.store import read_layouts
from hydraserve.errors import BusyError, InvalidRequestError
from hydraserve.server.lifecycle.served import ServedAdapter
from hydraserve.server.routing_answer import Generated, RoutingAnswer, check_size, choose, select, token_texts
from hydraserve.server.routing_schemas import RoutingFormat, RoutingRequest

router = APIRouter(prefix="/v1", tags=["routing"])

# A trace takes memory in the engine's workers for as long as its request runs: of all routers, whichever are shown.
MAX_TRACES = 8
MAX_TRACE_BYTES = 512 * 2**20  # of all traces, in one worker
MAX_TOKENS = 4096

CLIENT_CLOSED_REQUEST = 499  # as proxies log it; nobody reads this answer

MEDIA_TYPES = {RoutingFormat.NPZ: "application/x-npz", RoutingFormat.SAFETENSORS: "application/x-safetensors"}

T = TypeVar("T")


class Tracer:
    """Traces requests, a few at a time.

    engine:      see `EngineObservation`.
    served:      name -> what new requests for it are served with.
    token_bytes: memory that a trace takes for each token, see `EngineSizes`.
    """

    def __init__(self, engine: EngineObservation, served: Mapping[str, ServedAdapter], token_bytes: int) -> None:
        self.engine = engine
        self._served, self._token_bytes = served, token_bytes
        self._under_way: list[int] = []  # bytes of each

    async def trace(self, request: RoutingRequest, state: Any) -> tuple[str, dict[str, Any], RoutingTrace]:
        """(id, vLLM's answer, routing weights). What can be refused is refused before anything is computed.

        Raises HydraServeError.
        """
        request_id = f"routing-{uuid.uuid4().hex}"
        body = request.completion_body(request_id)
        prompt = await self.engine.count_prompt(state, body, request.chat)
        tokens = self._count_tokens(prompt, request.max_tokens)
        routers = await self._routers(request.model)
        chosen = choose(list(routers), request.modules, request.layers)
        check_size(request.format, tokens, [list(routers.values())[i] for i in chosen])
        async with self._recording(request_id, tokens):
            answer = await self.engine.generate(state, body, request.chat)
            trace = await self.engine.finish_trace(request_id)
        if not trace.routers:  # routers of modules that this model does not run
            raise _no_router(request.model)
        return request_id, answer, trace

    def _count_tokens(self, prompt: int, answer: int) -> int:
        """Of both together. Raises InvalidRequestError."""
        limit = min(MAX_TOKENS, self.engine.max_tokens)
        if self._token_bytes:
            limit = min(limit, MAX_TRACE_BYTES // self._token_bytes)
        if prompt + answer > limit:
            raise InvalidRequestError(
                "prompt and answer",
                got=f"{prompt} tokens and max_tokens {answer}",
                expected=f"at most {limit} tokens in all",
                fix="send a shorter prompt, or ask for fewer tokens",
            )
        return prompt + answer

    async def _routers(self, model: str) -> dict[str, int]:
        """Heads of each router of an adapter, by the path of its layer. Raises InvalidRequestError for none."""
        served = self._served.get(model)
        if served is None:  # the base model: unknown names are refused with the prompt
            raise _no_router(model)
        with served.held():
            layouts = await asyncio.to_thread(read_layouts, served.stored.path)
        routers = {name: layout.heads for name, layout in layouts.items() if layout.has_router and layout.heads > 1}
        if not routers:
            raise _no_router(model)
        return routers

    @asynccontextmanager
    async def _recording(self, request_id: str, tokens: int) -> AsyncIterator[None]:
        nbytes = tokens * self._token_bytes
        if len(self._under_way) >= MAX_TRACES or sum(self._under_way) + nbytes > MAX_TRACE_BYTES:
            raise BusyError(
                "routing",
                got=f"{len(self._under_way)} requests under way, {sum(self._under_way) + nbytes:,} bytes with this one",
                expected=f"at most {MAX_TRACES}, and {MAX_TRACE_BYTES:,} bytes",
                fix="try again soon",
            )
        self._under_way.append(nbytes)
        try:
            await self.engine.start_trace(request_id, tokens)
            yield
        except BaseException:  # also where the client left while it began: the engine may have begun it all the same
            await asyncio.shield(self.engine.finish_trace(request_id))
            raise
        finally:
            self._under_way.remove(nbytes)


def _no_router(model: str) -> InvalidRequestError:
    return InvalidRequestError(
        "model",
        got=f"{model!r}, which has no router",
        expected="an adapter whose heads a router mixes",
        fix="name a HydraLoRA adapter; GET /v1/adapters lists them",
    )


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
        return StreamingResponse(made.json(), media_type="application/json")
    write = made.npz if body.format is RoutingFormat.NPZ else made.safetensors
    return Response(await asyncio.to_thread(write), media_type=MEDIA_TYPES[body.format])


def _answer(
    body: RoutingRequest, engine: EngineObservation, request_id: str, answer: dict[str, Any], trace: RoutingTrace
) -> RoutingAnswer:
    choice = answer["choices"][0]
    prompt_ids = list((answer if body.chat else choice)["prompt_token_ids"])
    token_ids = list(choice["token_ids"])
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
