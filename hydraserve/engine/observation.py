"""The engine, watched from the server's process: `EngineObservation` over vLLM's AsyncLLM."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from hydraserve.adapters.observation import (
    EngineCounts,
    RequestEnd,
    RequestObserver,
    RouterCount,
    RoutingTrace,
    SlotCounts,
)
from hydraserve.adapters.weights import natural_order
from hydraserve.engine.logs import first_line
from hydraserve.engine.routing import entropy_scale
from hydraserve.errors import BusyError, EngineError, InvalidRequestError, UnknownAdapterError


class WatchedEngine:
    """See `EngineObservation`. engine: vLLM's AsyncLLM, whose workers have `HydraWorkerExtension`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.observer: RequestObserver | None = None

    async def take_counts(self) -> EngineCounts:
        return merge_counts(await self._call("hydra_take_counts"))

    def requests(self) -> Mapping[str | None, tuple[int, int]]:
        found: Counter[tuple[str | None, bool]] = Counter()
        for state in self._engine.output_processor.request_states.values():
            found[state.lora_name, state.is_prefilling] += 1
        return {adapter: (found[adapter, False], found[adapter, True]) for adapter in {name for name, _ in found}}

    async def start_trace(self, trace: str, limit: int) -> None:
        await self._call("hydra_start_trace", trace, limit)

    async def finish_trace(self, trace: str) -> RoutingTrace:
        return merge_traces([part for part in await self._call("hydra_finish_trace", trace) if part is not None])

    async def count_prompt(self, state: Any, body: Mapping[str, Any], chat: bool) -> int:
        request = _request(body, chat)
        if chat:
            rendered = _answered(await state.openai_serving_chat.render_chat_request(request))
            prompts = rendered[1]  # after the conversation
        else:
            prompts = _answered(await state.openai_serving_completion.render_completion_request(request))
        return len(prompts[0]["prompt_token_ids"])

    async def generate(self, state: Any, body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
        request = _request(body, chat)
        if chat:
            answer = await state.openai_serving_chat.create_chat_completion(request)
        else:
            answer = await state.openai_serving_completion.create_completion(request)
        dumped: dict[str, Any] = _answered(answer).model_dump()
        return dumped

    def decode(self, token_ids: list[int]) -> str:
        return str(self._engine.renderer.get_tokenizer().decode(token_ids, skip_special_tokens=False))

    @property
    def max_tokens(self) -> int:
        return int(self._engine.model_config.max_model_len)

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """The answers of all workers of all engines."""
        core = self._engine.engine_core
        try:
            engines = await core.call_utility_all_async("collective_rpc", method, None, args, None)
        except Exception as e:
            raise EngineError(what=f"call of {method}", got=str(e), expected="an answer of the engine") from e
        return [answer for workers in engines for answer in workers]


def _request(body: Mapping[str, Any], chat: bool) -> Any:
    """vLLM's request. Raises InvalidRequestError."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    try:
        return (ChatCompletionRequest if chat else CompletionRequest)(**body)
    except ValueError as e:  # pydantic's
        raise InvalidRequestError(what="request", got=first_line(e)) from e


def _answered(answer: Any) -> Any:
    """What a handler of vLLM's gave. Raises InvalidRequestError or UnknownAdapterError when that is a refusal."""
    if hasattr(answer, "error"):
        raise (UnknownAdapterError if answer.error.code == 404 else InvalidRequestError)(what=answer.error.message)
    return answer


def merge_counts(answers: Sequence[Mapping[str, Any]]) -> EngineCounts:
    """One count from those of all workers: sums over engines (data parallel) and over parts of the model (pipeline).

    Slots are alike in all workers of an engine, so those of its first one count.
    """
    routers: dict[int, dict[str, RouterCount]] = {}
    for answer in answers:
        for adapter_id, tokens, heads, data in answer["adapters"]:
            sums = np.frombuffer(data, dtype=np.float64).reshape(-1, answer["width"])
            found = routers.setdefault(adapter_id, {})
            for name, number, row in zip(answer["names"], heads, sums, strict=True):
                if number:
                    entropy = float(row[-1]) * entropy_scale(number)
                    count = RouterCount(tokens, tuple(row[:number].tolist()), entropy)
                    found[name] = _added(found[name], count) if name in found else count
    leaders = [answer["slots"] for answer in answers if answer["is_leader"]]
    loads: Counter[int] = Counter()
    evictions: Counter[int] = Counter()
    for slots in leaders:
        loads.update(dict(slots["loads"]))
        evictions.update(dict(slots["evictions"]))
    hits, misses = (sum(slots[key] for slots in leaders) for key in ("hits", "misses"))
    steps = sum(answer["steps"] for answer in answers if answer["is_leader"])
    return EngineCounts(routers, steps, SlotCounts(loads, evictions, hits, misses))


def _added(a: RouterCount, b: RouterCount) -> RouterCount:
    weights = tuple(x + y for x, y in zip(a.weights, b.weights, strict=True))
    return RouterCount(a.tokens + b.tokens, weights, a.entropy + b.entropy)


def merge_traces(parts: Sequence[Mapping[str, Any]]) -> RoutingTrace:
    """One trace from those of workers that have different layers. Raises BusyError when one had no memory for it."""
    for part in parts:
        if "error" in part:
            raise BusyError("routing", got=part["error"], expected="memory for the weights", fix="ask for fewer tokens")
    heads = {name: number for part in parts for name, number in zip(part["names"], part["heads"], strict=True)}
    if not heads:
        return RoutingTrace((), (), np.zeros((0, 0, 0), dtype=np.float32))
    names, most = natural_order(heads), max(heads.values())
    columns: dict[str, Any] = {}
    for part in parts:
        data = np.frombuffer(part["weights"], dtype=np.float32)
        weights = data.reshape(-1, len(part["names"]), max(part["heads"]))
        padded = np.pad(weights, ((0, 0), (0, 0), (0, most - weights.shape[2])), constant_values=np.nan)
        columns.update(zip(part["names"], padded.swapaxes(0, 1), strict=True))
    return RoutingTrace(tuple(names), tuple(heads[name] for name in names), np.stack([columns[n] for n in names], 1))


async def observed(
    original: Callable[..., AsyncGenerator[Any, None]],
    engine: Any,
    prompt: Any,
    params: Any,
    request_id: str,
    lora_request: Any = None,
    **kwargs: Any,
) -> AsyncGenerator[Any, None]:
    """`original` (AsyncLLM.generate) with the server's observer told how each request went."""
    outputs = original(engine, prompt, params, request_id, lora_request=lora_request, **kwargs)
    observer: RequestObserver | None = engine.hydra_watched.observer
    if observer is None:
        async with aclosing(outputs):
            async for output in outputs:
                yield output
        return
    progress = _Progress(params)
    begun = observer.begin(lora_request.lora_name if lora_request is not None else None)
    try:
        async with aclosing(outputs):
            async for output in outputs:
                progress.add(output)
                yield output
    except GeneratorExit:
        progress.outcome = progress.outcome or "abort"
        raise
    except BaseException as e:
        progress.outcome = "error" if isinstance(e, Exception) else "abort"
        raise
    finally:
        observer.end(begun, progress.end())


class _Progress:
    """What is known of a request so far."""

    def __init__(self, params: Any) -> None:
        self._arrived, self._arrived_wall = time.monotonic(), time.time()
        self._pieces = params.output_kind.name == "DELTA"
        self._first: float | None = None
        self._last_output: Any = None
        self._generated: Counter[int] = Counter()
        self.outcome: str | None = None

    def add(self, output: Any) -> None:
        self._first = self._first or time.monotonic()
        self._last_output = output
        for sample in output.outputs:
            seen = self._generated[sample.index] if self._pieces else 0
            self._generated[sample.index] = seen + len(sample.token_ids)
        if output.finished:
            self.outcome = next((s.finish_reason for s in output.outputs if s.finish_reason), "stop")

    def end(self) -> RequestEnd:
        output, stats = self._last_output, getattr(self._last_output, "metrics", None)
        return RequestEnd(
            outcome=self.outcome or "abort",
            prompt_tokens=len(output.prompt_token_ids or ()) if output is not None else 0,
            generated_tokens=sum(self._generated.values()),
            seconds=time.monotonic() - self._arrived,
            first_token=self._first_token(stats),
            per_token=_per_token(stats),
        )

    def _first_token(self, stats: Any) -> float | None:
        """As vLLM measured it, plus the wait before vLLM knew of the request; the first output shows it only when
        tokens are streamed."""
        if stats is not None and stats.first_token_latency:
            return float(stats.first_token_latency + max(0.0, stats.arrival_time - self._arrived_wall))
        return self._first - self._arrived if self._pieces and self._first is not None else None


def _per_token(stats: Any) -> float | None:
    if stats is None or stats.num_generation_tokens < 2 or not stats.first_token_ts:
        return None
    return float((stats.last_token_ts - stats.first_token_ts) / (stats.num_generation_tokens - 1))
