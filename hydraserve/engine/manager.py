"""vLLM's LoRA managers, taking HydraAdapters: which are in host memory, which in a slot."""

from __future__ import annotations

import logging
from typing import Any

import torch
from hydra_kernels.ops.library import warm_up
from hydra_kernels.slots import StackedSlots
from vllm.config import VllmConfig
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from hydraserve.adapters.checkpoint import load_adapter
from hydraserve.adapters.requirements import check_capacity
from hydraserve.adapters.store import is_stored, read_stored
from hydraserve.adapters.validate import check_range
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.engine.layers import HydraLinear, ModuleWeights, resolved_dtype, slot_capacity
from hydraserve.engine.loader import HydraLoRAModel, to_lora_model
from hydraserve.engine.options import EngineOptions, refuse_wrong_results
from hydraserve.engine.routing import RoutingRecorder, SlotEvents, current_step
from hydraserve.engine.worker import AdapterLoader
from hydraserve.errors import AdapterConflictError, AdapterNotFoundError, BaseMismatchError, BaseShapeError

logger = logging.getLogger(__name__)


class HydraLoRAModelManager(LRUCacheLoRAModelManager):
    """Packs the parts of merged layers as HydraWeights; the rest is vLLM's."""

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()  # type: ignore[no-untyped-call]
        wrapper: Any  # ours, see `with_step_metadata`
        for wrapper in self.punica_wrapper_mapping.values():
            wrapper.native_layers = any(
                not isinstance(module, HydraLinear) and module.punica_wrapper is wrapper
                for module in self.modules.values()
            )

    def record_routing(self, heads: int, every: int) -> None:
        """Watch the routers of the language model's layers. See `RoutingRecorder`."""
        layers = []
        for name, module in self.modules.items():
            if isinstance(module, HydraLinear) and module.punica_wrapper is self._language_wrapper:
                parts = self.packed_modules.get(name, [name])
                slices = len(module.slots.out_slices)
                names = parts if len(parts) == slices else [f"{name}.{i}" for i in range(slices)]
                layers.append((names, module.slots))
        self.slot_events = SlotEvents()
        self.routing = RoutingRecorder(layers, self.max_num_batched_tokens, heads, every)

    def warm_up(self) -> None:
        """Compile the GPU kernels for each shape of layer, so that no request waits for a compiler."""
        shapes = {
            (module.slots.in_features, tuple(module.slots.out_slices)): module.slots
            for module in self.modules.values()
            if isinstance(module, HydraLinear)
        }
        for slots in shapes.values():
            if isinstance(slots, StackedSlots):
                warm_up(slots, self.max_num_batched_tokens)

    @property
    def _language_wrapper(self) -> Any:
        """What the language model's layers get their step metadata from: vLLM makes it first."""
        return next(iter(self.punica_wrapper_mapping.values()))

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        """As vLLM's, which computes nothing when a step repeats the last mapping; what is recorded may still differ."""
        super().set_adapter_mapping(mapping)
        if mapping.type is LoRAMappingType.LANGUAGE:
            slots = self._language_wrapper.step.part("token_slot")
            self.routing.prepare(slots.numpy()[: len(mapping.index_mapping)])

    def activate_adapter(self, lora_id: int) -> bool:
        self.slot_events.looked_up(lora_id, lora_id in self._active_adapters, current_step.begins(lora_id))
        return super().activate_adapter(lora_id)

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            self.routing.leaves_slot(self.lora_index_to_id.index(lora_id), lora_id)
            self.slot_events.evictions[lora_id] += 1
        super()._deactivate_adapter(lora_id)

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        if not isinstance(lora_model, HydraLoRAModel):
            super()._create_merged_loras_inplace(lora_model)  # vLLM's warm-up adapters
            return
        for name, children in self.packed_modules.items():
            parts = [lora_model.loras.pop(child, None) for child in children]
            if any(parts):
                packed = [weights for part in parts for weights in (part.parts if part else [None])]
                lora_model.loras[name] = ModuleWeights(packed)

    @property
    def adaptable(self) -> set[str]:
        """Paths of the layers that an adapter may have weights for; merged ones by their parts' names too."""
        return set(self.modules) | {child for children in self.packed_modules.values() for child in children}

    def check(self, lora_model: HydraLoRAModel) -> None:
        """Raises BaseMismatchError when a module of the adapter is no adaptable layer of this model."""
        known = self.adaptable
        # Under pipeline parallelism a rank has only some of the layers: compare names without layer numbers.
        generic = {_without_numbers(name) for name in known}
        unknown = sorted(n for n in lora_model.loras if n not in known and _without_numbers(n) not in generic)
        if unknown:
            raise BaseMismatchError(
                what=f"adapter {lora_model.source}",
                got=f"weights for {unknown[0]}" + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""),
                expected=f"modules that this server wraps: {', '.join(sorted({n.split('.')[-1] for n in known}))}",
                fix="start the server with this adapter or with --target-modules, so that these modules are wrapped",
            )

    def pack(self, lora_model: HydraLoRAModel) -> None:
        """Bring the adapter's modules into the form that `add_adapter` takes. Reads only what never changes, so it
        may run in any thread.

        Raises BaseShapeError when a module has another size in this model: content that an earlier run of the server
        has stored may have been checked against another one, and a step that finds out ends the engine.
        """
        self._create_merged_loras_inplace(lora_model)
        for name, weights in lora_model.loras.items():
            module = self.modules.get(name)
            try:
                if isinstance(module, HydraLinear):
                    module.check(weights.parts)
            except ValueError as e:
                raise BaseShapeError(
                    what=f"adapter {lora_model.source}: module {name}",
                    got=f"weights of {e}",
                    expected="an adapter for the base model of this server",
                    fix="remove it, or start the server with the base model that it was trained for",
                ) from e

    def remove_adapter(self, adapter_id: int) -> bool:
        """As vLLM's, but the slot is emptied as well: on the CPU it holds memory of the adapter's size."""
        slot = self.lora_index_to_id.index(adapter_id) if adapter_id in self.lora_index_to_id else None
        removed = super().remove_adapter(adapter_id)
        if slot is not None:
            for module in self.modules.values():
                module.reset_lora(slot)
        return removed

    def holds(self, adapter_id: int) -> bool:
        """Whether the adapter is in host memory."""
        return adapter_id in self._registered_adapters

    def in_slot(self, adapter_id: int) -> bool:
        return adapter_id in self._active_adapters

    def touch(self, adapter_id: int) -> None:
        """Count the adapter as used now."""
        self._registered_adapters.touch(adapter_id)

    def unpin_adapter(self, adapter_id: int) -> None:
        """Undo `pin_adapter`."""
        for cache in (self._registered_adapters, self._active_adapters):
            if adapter_id in cache.pinned_items:
                cache._unpin(adapter_id)

    @property
    def pinned(self) -> set[int]:
        """Ids of the adapters that keep their slot."""
        return set(self._active_adapters.pinned_items)


def _without_numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


class HydraWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """Loads adapters through `hydraserve.adapters`, whatever their format.

    Under `hydraserve serve` the server decides what is in host memory: `loader` prepares an adapter in another
    thread, `keep` puts it here, and a request is only let in while its adapter is here. Where nobody does that
    (vLLM's own LLM class), an adapter is loaded when the first step needs it, as in vLLM.
    """

    _manager_cls = HydraLoRAModelManager
    _adapter_manager: HydraLoRAModelManager

    def __init__(self, vllm_config: VllmConfig, device: torch.device, embedding_modules: dict[str, str]) -> None:
        super().__init__(vllm_config, device, embedding_modules, lora_model_cls=HydraLoRAModel)
        refuse_wrong_results(fully_sharded_loras=self.lora_config.fully_sharded_loras)  # here also for `vllm serve`
        self.options = EngineOptions.from_vllm_config(vllm_config)
        self.loader = AdapterLoader(self)
        self._unloaded: set[int] = set()

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        with slot_capacity(self.options.capacity):
            wrapped = super().create_lora_manager(model, vllm_config)
        self._adapter_manager.record_routing(self.options.capacity.heads, self.options.router_metrics)
        self._adapter_manager.warm_up()
        return wrapped

    @property
    def routing(self) -> RoutingRecorder:
        return self._adapter_manager.routing

    def take_counts(self) -> dict[str, Any]:
        """What routers and slots did since the last call, as plain data."""
        manager = self._adapter_manager
        return {**manager.routing.take(manager.lora_index_to_id), "slots": manager.slot_events.take()}

    def sizes(self) -> dict[str, Any]:
        """Fields of `EngineSizes`, as plain data."""
        capacity = self.options.capacity
        return {
            "slots": self._adapter_manager.lora_slots,
            "host_adapters": self._adapter_manager.capacity,
            "capacity": [capacity.rows, capacity.k, capacity.heads],
            "dtype": str(resolved_dtype(self.lora_config)).removeprefix("torch."),
            "targets": sorted({name.rpartition(".")[2] for name in self._adapter_manager.adaptable}),
            "trace_bytes": self.routing.trace_bytes,
        }

    def prepare(self, adapter_id: int, path: str, digest: str) -> HydraLoRAModel:
        """A stored adapter, ready for `keep`. May run in any thread.

        Raises AdapterError's subclasses.
        """
        return self._to_model(read_stored(path, digest), adapter_id)

    def keep(self, lora: HydraLoRAModel) -> None:
        """Hold an adapter in host memory. The server makes room first; should there be none, the oldest one goes."""
        manager = self._adapter_manager
        if not manager.holds(lora.id):
            if len(manager) + 1 > manager.capacity:
                manager.remove_oldest_adapter()
            manager.add_adapter(lora)
        self._unloaded.discard(lora.id)

    def unload(self, adapter_id: int) -> None:
        """Empty the adapter's slot and free its host memory."""
        self._unloaded.add(adapter_id)
        self._adapter_manager.remove_adapter(adapter_id)
        self.loader.release_memory()

    def pin(self, adapter_id: int, pinned: bool) -> None:
        """Put an adapter that is in host memory into a slot for good, or let it go.

        Raises AdapterConflictError when that would leave no slot for others.
        """
        manager = self._adapter_manager
        if not pinned:
            manager.unpin_adapter(adapter_id)
            return
        if len(manager.pinned | {adapter_id}) >= manager.lora_slots:
            raise AdapterConflictError(
                what="pinned adapters",
                got=f"{len(manager.pinned)} of {manager.lora_slots} slots taken by them",
                expected="at least one slot for the others",
                fix="unpin an adapter, or start the server with more --slots",
            )
        with gpu_sync_allowed():
            manager.pin_adapter(adapter_id)

    def residency(self) -> dict[str, Any]:
        """host: [(id, bytes)], slots: [id or None]."""
        held = self._adapter_manager.list_adapters()
        host = [(key, lora.nbytes) for key, lora in held.items() if isinstance(lora, HydraLoRAModel)]
        return {"host": host, "slots": list(self._adapter_manager.lora_index_to_id)}

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        """As vLLM's, but adapters of the batch that are in a slot already are never evicted for one that is not."""
        manager = self._adapter_manager
        wanted = {request.lora_int_id: request for request in lora_requests if request}
        if len(wanted) > manager.lora_slots:
            raise RuntimeError(f"got {len(wanted)} adapters in one batch, expected at most {manager.lora_slots}")
        for request in sorted(wanted.values(), key=lambda r: not manager.in_slot(r.lora_int_id)):
            try:
                self.add_adapter(request)
            except Exception:
                # The server unloads what no request uses; but the last step of a request that was aborted may still
                # be under way, and its adapter be gone from the disk too. Nobody reads what that step computes.
                if request.lora_int_id not in self._unloaded:
                    raise
                logger.info("adapter %s is gone; its request was aborted", request.lora_name)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        manager = self._adapter_manager
        if lora_request.load_inplace or not manager.holds(lora_request.lora_int_id):
            return super().add_adapter(lora_request)
        with gpu_sync_allowed():
            manager.touch(lora_request.lora_int_id)
            manager.activate_adapter(lora_request.lora_int_id)
        return True

    def _load_adapter(self, lora_request: LoRARequest) -> HydraLoRAModel:
        path = lora_request.lora_path
        try:
            adapter = read_stored(path) if is_stored(path) else load_adapter(get_adapter_absolute_path(path))
        except AdapterNotFoundError as e:
            raise LoRAAdapterNotFoundError(lora_request.lora_name, path) from e
        return self._to_model(adapter, lora_request.lora_int_id)

    def _to_model(self, adapter: HydraAdapter, adapter_id: int) -> HydraLoRAModel:
        """Ready for `keep`. Raises LimitError, BaseMismatchError or NonFiniteError when this model cannot take the
        adapter."""
        check_capacity(adapter, self.options.capacity)
        dtype = resolved_dtype(self.lora_config)
        if dtype is torch.float16:  # the one that ends early; what is stored may have been checked for another
            check_range(adapter, dtype)
        mapper = getattr(self._adapter_manager.model, "hf_to_vllm_mapper", None)
        if mapper is not None:
            mapper = mapper.get_rename_mapper()
        lora = to_lora_model(adapter, adapter_id, dtype, mapper)
        self._adapter_manager.check(lora)
        self._adapter_manager.pack(lora)
        return lora
