"""The engine's adapters, seen from the server's process: `AdapterRuntime` over vLLM's AsyncLLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager, nullcontext
from typing import Any

import torch
from hydra_kernels import SlotCapacity
from vllm.lora.request import LoRARequest
from vllm.utils.counter import AtomicCounter

from hydraserve import errors
from hydraserve.adapters.runtime import EngineSizes, RequestHooks, Residency
from hydraserve.errors import EngineError, HydraServeError, InvalidRequestError

# Seconds between two questions whether a load has ended: short at first, as most take a few milliseconds.
_FIRST_POLL_S, _LONGEST_POLL_S = 0.005, 0.05
# In place of a key's salt, which is hexadecimal.
_NO_KEY = "-"


class EngineAdapters:
    """See `AdapterRuntime`. `engine`: vLLM's AsyncLLM, whose workers have `HydraWorkerExtension`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._ids = AtomicCounter(0)
        self._loads: dict[int, _Load] = {}
        self._poller: asyncio.Task[None] | None = None
        self._entered: dict[str, bool] = {}  # requests in `generate` -> whether they are to end
        self.hooks: RequestHooks | None = None

    @property
    def process(self) -> tuple[int, int]:
        """Which of how many API server processes this is."""
        config = self._engine.vllm_config.parallel_config
        return config._api_process_rank, config._api_process_count

    async def sizes(self) -> EngineSizes:
        workers = await self._call("hydra_ready")
        first, trace_bytes = workers[0], max(worker["trace_bytes"] for worker in workers)
        capacity, dtype = SlotCapacity(*first["capacity"]), getattr(torch, first["dtype"])
        targets = tuple(first["targets"])
        return EngineSizes(first["slots"], first["host_adapters"], capacity, targets, dtype, trace_bytes)

    def new_id(self) -> int:
        return int(self._ids.inc(1))

    def request(self, adapter: str, adapter_id: int, path: str) -> LoRARequest:
        return LoRARequest(lora_name=adapter, lora_int_id=adapter_id, lora_path=path)

    def publish(self, models: Any, requests: Any, name_of: Callable[[str], str]) -> None:
        base_name = models.model_name

        def model_name(lora_request: LoRARequest | None = None) -> str:
            return base_name() if lora_request is None else name_of(lora_request.lora_name)

        models.lora_requests, models.model_name = requests, model_name

    async def load(self, adapter_id: int, path: str, digest: str) -> None:
        load = self._loads[adapter_id] = _Load(asyncio.get_running_loop().create_future())
        try:
            await self._call("hydra_start_load", adapter_id, path, digest)
        except BaseException:
            self._loads.pop(adapter_id, None)
            raise
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        error = await load.done
        if error is not None:
            await self._call("hydra_unload", adapter_id)  # where other ranks have it
            raise error

    async def unload(self, adapter_id: int) -> None:
        await self._call("hydra_unload", adapter_id)

    async def pin(self, adapter_id: int, pinned: bool) -> None:
        await self._call("hydra_pin", adapter_id, pinned)

    async def evict_blocks(self, adapter: str) -> int:
        return sum(await self._engine.engine_core.call_utility_all_async("hydra_evict_blocks", adapter))

    async def residency(self) -> Residency:
        engines = await self._call_engines("hydra_residency")
        pools = await self._engine.engine_core.call_utility_all_async("hydra_count_blocks")
        host: dict[int, int] = {}
        workers = [worker for engine in engines for worker in engine]
        for worker in workers:
            for adapter_id, nbytes in worker["host"]:
                host[adapter_id] = max(nbytes, host.get(adapter_id, 0))
        blocks, free, cached = (sum(counts) for counts in zip(*pools, strict=True))
        return Residency(
            host=host,
            slots=tuple(adapter_id for engine in engines for adapter_id in engine[0]["slots"]),
            blocks=blocks,
            free_blocks=free,
            cached_blocks=cached,
            process_bytes=max(worker["process_bytes"] for worker in workers),
        )

    async def abort(self, request_ids: Iterable[str]) -> None:
        ids = list(request_ids)
        self._entered |= dict.fromkeys(self._entered.keys() & ids, True)
        await self._engine.abort(ids)

    @contextmanager
    def entered(self, request_id: str) -> Iterator[None]:
        """For as long as a request may be on its way into the engine, which does not know it yet."""
        self._entered[request_id] = False
        try:
            yield
        finally:
            self._entered.pop(request_id, None)

    def is_to_end(self, request_id: str) -> bool:
        """Whether `abort` was called for a request since it has entered."""
        return self._entered.get(request_id, False)

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """The answers of all workers of all engines."""
        return [answer for workers in await self._call_engines(method, *args) for answer in workers]

    async def _call_engines(self, method: str, *args: Any) -> list[list[Any]]:
        """Of each (data-parallel) engine, the answers of its workers."""
        core = self._engine.engine_core
        try:
            engines: list[list[Any]] = await core.call_utility_all_async("collective_rpc", method, None, args, None)
        except Exception as e:
            raise EngineError(what=f"call of {method}", got=str(e), expected="an answer of the engine") from e
        return engines

    async def _poll(self) -> None:
        pause = _FIRST_POLL_S
        while self._loads:
            try:
                answers = await self._call("hydra_finish_loads")
            except HydraServeError as e:
                for load in self._loads.values():
                    load.finish(e)
                self._loads.clear()
                return
            for finished in answers:
                for adapter_id, error in finished:
                    if adapter_id in self._loads:
                        self._loads[adapter_id].count(error)
            for adapter_id in [i for i, load in self._loads.items() if load.answers == len(answers)]:
                load = self._loads.pop(adapter_id)
                load.finish(load.error)
                pause = _FIRST_POLL_S
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_POLL_S)


class _Load:
    """One load under way, in all workers. done: its error, or None."""

    def __init__(self, done: asyncio.Future[HydraServeError | None]) -> None:
        self.done, self.answers = done, 0
        self.error: HydraServeError | None = None

    def count(self, error: dict[str, Any] | None) -> None:
        """One worker has ended."""
        self.answers += 1
        if error is not None and self.error is None:
            self.error = errors.unpack(error)

    def finish(self, error: HydraServeError | None) -> None:
        if not self.done.done():  # it is, when who waited was cancelled
            self.done.set_result(error)


async def generate(
    original: Callable[..., AsyncGenerator[Any, None]],
    engine: Any,
    prompt: Any,
    params: Any,
    request_id: str,
    lora_request: LoRARequest | None = None,
    **kwargs: Any,
) -> AsyncGenerator[Any, None]:
    """`original` (AsyncLLM.generate or .encode) with the server's hooks around it."""
    hooks: RequestHooks | None = engine.hydra_adapters.hooks
    if hooks is not None:
        prompt = salted(prompt, hooks.cache_salt())
    admission: AbstractAsyncContextManager[None] = nullcontext()
    if hooks is not None and lora_request is not None:
        admission = hooks.admit(lora_request.lora_int_id, lora_request.lora_name, request_id)
    with engine.hydra_adapters.entered(request_id):
        async with admission:
            outputs = original(engine, prompt, params, request_id, lora_request=lora_request, **kwargs)
            async with aclosing(outputs):  # a client that goes away: abort first, and only then leave the admission
                async for output in outputs:
                    yield output


async def add_request(
    original: Callable[..., Awaitable[Any]], engine: Any, request_id: str, *args: Any, **kwargs: Any
) -> Any:
    """`original` (AsyncLLM.add_request), for requests that may have been aborted before the engine knew them."""
    queue = await original(engine, request_id, *args, **kwargs)
    if engine.hydra_adapters.is_to_end(request_id):
        await engine.abort(request_id)
    return queue


def salted(prompt: Any, salt: str | None) -> Any:
    """The prompt with the salt of its sender's key, see `RequestHooks.cache_salt`.

    What a client gives itself is kept apart from the salts of keys: it could be another one's.

    Raises InvalidRequestError for a prompt that takes no salt, when it needs one.
    """
    if isinstance(prompt, Mapping) and "decoder_prompt" in prompt:  # vLLM looks for the salt there
        return {**prompt, "decoder_prompt": salted(prompt["decoder_prompt"], salt)}
    if isinstance(prompt, Mapping):
        own = prompt.get("cache_salt")
        if salt is not None or own:
            return {**prompt, "cache_salt": f"{salt or _NO_KEY}:{own or ''}"}
    elif salt is not None:
        raise InvalidRequestError(
            what="prompt",
            got="one that comes in parts",
            expected="a whole prompt, from a key whose prefix cache is its own",
            fix="use another route, or a key that is not isolated",
        )
    return prompt
