"""What can be called in each worker process through `collective_rpc`, and the thread that loads adapters there.

vLLM mixes `HydraWorkerExtension` into its worker class (`--worker-extension-cls`). Calls run in the thread that
runs the model, between two steps, so each of them must be short.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hydraserve import errors
from hydraserve.adapters.ingest import release_memory
from hydraserve.engine.routing import RoutingCalls
from hydraserve.errors import EngineError, HydraServeError

if TYPE_CHECKING:
    from hydraserve.engine.loader import HydraLoRAModel
    from hydraserve.engine.manager import HydraWorkerLoRAManager

# The loading thread yields to the model's own threads where they share cores.
_NICENESS = 10
# How long one thread may keep Python's lock when another waits for it. The model's thread gives it up and needs it
# again many times in a step; with Python's 5 ms a step beside the loading thread would take twice as long.
_SWITCH_INTERVAL_S = 0.0002


class AdapterLoader:
    """Loads adapters in one background thread of low priority, for `HydraWorkerLoRAManager`."""

    def __init__(self, manager: HydraWorkerLoRAManager) -> None:
        self._manager = manager
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters", initializer=_prepare_thread)
        self._pending: dict[int, Future[HydraLoRAModel]] = {}

    def start(self, adapter_id: int, path: str, digest: str) -> None:
        """Begin to load; nothing happens when that has begun."""
        if adapter_id not in self._pending:
            self._pending[adapter_id] = self._thread.submit(self._manager.prepare, adapter_id, path, digest)

    def finished(self) -> list[tuple[int, HydraLoRAModel | HydraServeError]]:
        """(id, adapter or why there is none) of each load that has ended since the last call."""
        ended = [adapter_id for adapter_id, future in self._pending.items() if future.done()]
        return [(adapter_id, _outcome(self._pending.pop(adapter_id))) for adapter_id in ended]

    def release_memory(self) -> None:
        """Give freed memory back to the operating system, when nothing else is to be done."""
        self._thread.submit(release_memory)


def _outcome(future: Future[HydraLoRAModel]) -> HydraLoRAModel | HydraServeError:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, HydraServeError):
        return error
    return EngineError("loading an adapter", got=f"{type(error).__name__}: {error}", expected="no error")


def _prepare_thread() -> None:
    """Linux knows niceness and affinity for each thread. vLLM binds the model's threads to cores; this one, which
    would inherit one core, may run on any."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, _NICENESS)
    os.sched_setaffinity(thread, range(os.cpu_count() or 1))
    torch.set_num_threads(1)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def freeze_heap() -> None:
    """Let the garbage collector pass over what is there now. vLLM does that in its GPU worker; in the CPU worker a full
    collection takes more than half a second, in which all streams stand still."""
    if gc.get_freeze_count() == 0:
        gc.collect()
        gc.freeze()


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class HydraWorkerExtension(RoutingCalls):
    """Mixed into vLLM's worker; every name here must be new there."""

    model_runner: Any

    @property
    def hydra_adapters(self) -> HydraWorkerLoRAManager:
        manager: HydraWorkerLoRAManager = self.model_runner.lora_manager
        return manager

    def hydra_ready(self) -> dict[str, Any]:
        """The engine is up and requests come next. Returns the fields of `EngineSizes`."""
        freeze_heap()
        return self.hydra_adapters.sizes()

    def hydra_start_load(self, adapter_id: int, path: str, digest: str) -> None:
        """Begin to load a stored adapter; `hydra_finish_loads` says when it is there."""
        self.hydra_adapters.loader.start(adapter_id, path, digest)

    # What a step has put into a slot may only be changed in the mode in which the step ran.
    @torch.inference_mode()
    def hydra_finish_loads(self) -> list[tuple[int, dict[str, Any] | None]]:
        """(id, None or the packed error) of each load that has ended; those without error are then
        in host memory."""
        return [(adapter_id, self._finish(outcome)) for adapter_id, outcome in self.hydra_adapters.loader.finished()]

    def _finish(self, outcome: HydraLoRAModel | HydraServeError) -> dict[str, Any] | None:
        if isinstance(outcome, HydraServeError):
            return errors.pack(outcome)
        self.hydra_adapters.keep(outcome)
        return None

    @torch.inference_mode()
    def hydra_unload(self, adapter_id: int) -> None:
        """Empty the adapter's slot and free its host memory."""
        self.hydra_adapters.unload(adapter_id)

    @torch.inference_mode()
    def hydra_pin(self, adapter_id: int, pinned: bool) -> None:
        """Put an adapter in host memory into a slot for good, or let it go."""
        self.hydra_adapters.pin(adapter_id, pinned)

    def hydra_residency(self) -> dict[str, Any]:
        """host: [(id, bytes)], slots: [id or None], process_bytes: resident memory of this process."""
        return {**self.hydra_adapters.residency(), "process_bytes": resident_bytes()}
