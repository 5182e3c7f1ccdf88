"""In each worker: what routers do, counted for each adapter, and traced for single requests.

The kernels record (`hydra_kernels.RoutingProbe`); here it is decided what, and whose it is. Slots change hands, so
their sums are taken whenever an adapter leaves one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hydra_kernels import LayerSlots, RoutingProbe
from hydra_kernels.probe import token_addresses
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank


@dataclass
class StepRequests:
    """Whose rows a step computes: request ids in the order of their rows, and how many rows each has."""

    request_ids: Sequence[str]
    rows: npt.NDArray[np.int32]


class Step:
    """The step that vLLM's runner is preparing, as the hooks in compat.py tell it.

    scheduled: vLLM's SchedulerOutput. requests: None in dummy steps.
    """

    scheduled: Any = None
    requests: StepRequests | None = None

    def take_requests(self) -> StepRequests | None:
        """The requests, once: a dummy step that follows has none."""
        requests, self.requests = self.requests, None
        return requests

    def begins(self, adapter_id: int) -> bool:
        """Whether a request for the adapter is new in this step."""
        new = self.scheduled.scheduled_new_reqs if self.scheduled is not None else ()
        return any(r.lora_request is not None and r.lora_request.lora_int_id == adapter_id for r in new)

    def computed(self, request_id: str) -> int:
        """How many tokens of the request were computed before this step."""
        for new in self.scheduled.scheduled_new_reqs:
            if new.req_id == request_id:
                return int(new.num_computed_tokens)
        cached = self.scheduled.scheduled_cached_reqs
        return int(cached.num_computed_tokens[cached.req_ids.index(request_id)])

    def tokens(self, request_id: str) -> int:
        """The most tokens, prompt and answer, that a request which is new in this step can have."""
        new = next(new for new in self.scheduled.scheduled_new_reqs if new.req_id == request_id)
        return len(new.prompt_token_ids or ()) + int(new.sampling_params.max_tokens)


current_step = Step()


@dataclass
class SlotEvents:
    """Adapters' ways in and out of slots since the last time they were asked for."""

    loads: Counter[int] = field(default_factory=Counter)
    evictions: Counter[int] = field(default_factory=Counter)
    hits: int = 0
    misses: int = 0

    def looked_up(self, adapter_id: int, in_slot: bool, begins: bool) -> None:
        """A step needs the adapter. begins: for a request that is new in it; those that go on are no hits, or long
        answers would hide all misses."""
        self.hits += in_slot and begins
        self.misses += not in_slot
        if not in_slot:
            self.loads[adapter_id] += 1

    def take(self) -> dict[str, Any]:
        """As plain data, and begin anew."""
        taken = {"loads": list(self.loads.items()), "evictions": list(self.evictions.items())}
        hits, misses = self.hits, self.misses
        self.loads, self.evictions, self.hits, self.misses = Counter(), Counter(), 0, 0
        return {**taken, "hits": hits, "misses": misses}


@dataclass
class _Trace:
    """limit: tokens. buffer: made when the request is seen first, and its length is known. error: why it could not."""

    limit: int
    buffer: torch.Tensor | None = None
    error: str | None = None


@dataclass
class _Total:
    """What was counted of one adapter. sums: as `RoutingProbe.sums` of a slot. heads: [routers], 0 for none."""

    tokens: int
    sums: torch.Tensor
    heads: npt.NDArray[np.int64]


class RoutingRecorder:
    """Counts and traces the routers of one worker's layers.

    layers: path of each (merged) layer's parts -> its slots, in the order of the layers.
    every:  every so many steps with an adapter are counted; 0: none. May be changed between two steps.
    """

    def __init__(
        self, layers: Sequence[tuple[Sequence[str], LayerSlots]], max_tokens: int, heads: int, every: int = 0
    ) -> None:
        self.names = [name for names, _ in layers for name in names]
        self.layers = [slots for _, slots in layers]
        num_slots = max((slots.num_slots for slots in self.layers), default=1)
        device = self.layers[0].device if layers else "cpu"
        self.probe = RoutingProbe(num_slots, len(self.names), heads, max_tokens, device)
        self.every, self._steps, self._counted = every, 0, 0
        self._tokens = np.zeros(num_slots, dtype=np.int64)
        self._totals: dict[int, _Total] = {}
        self._traces: dict[str, _Trace] = {}
        first = 0
        for slots in self.layers:
            slots.probe_with(self.probe, first)
            first += len(slots.out_slices)

    @property
    def trace_bytes(self) -> int:
        """Memory that a trace takes for each of its tokens, whichever routers are asked for."""
        return 4 * self.probe.routers * self.probe.heads  # float32

    def prepare(self, slots: npt.NDArray[np.int32], step: Step = current_step) -> None:
        """Say what the coming step records. slots: of each row, -1 for the base model."""
        requests = step.take_requests()
        if (not self.every and not self._traces and not self.probe.active) or not self._is_first_rank():
            return
        count = requests is not None and self._counts_this_step(slots)
        traces = self._addresses(step, requests) if requests is not None and self._traces else None
        self.probe.set(count=count, traces=traces)
        if count:
            self._counted += 1
            self._tokens += np.bincount(slots[slots >= 0], minlength=len(self._tokens))

    def _is_first_rank(self) -> bool:
        """All ranks of a tensor-parallel group compute the same weights: one of them records."""
        return get_tensor_model_parallel_rank() == 0

    def _counts_this_step(self, slots: npt.NDArray[np.int32]) -> bool:
        if not self.every or not (slots >= 0).any():
            return False
        self._steps += 1
        return self._steps % self.every == 0

    def _addresses(self, step: Step, requests: StepRequests) -> npt.NDArray[np.int64] | None:
        """Where each row's weights go; None when no row is traced."""
        addresses = np.zeros(int(requests.rows.sum()), dtype=np.int64)
        start = 0
        for request_id, rows in zip(requests.request_ids, requests.rows.tolist(), strict=False):
            trace = next((trace for name, trace in self._traces.items() if name in request_id), None)
            if trace is not None and (buffer := self._buffer(trace, step, request_id)) is not None:
                first = step.computed(request_id)
                addresses[start : start + rows] = token_addresses(buffer, np.arange(first, first + rows))
            start += rows
        return addresses if addresses.any() else None

    def _buffer(self, trace: _Trace, step: Step, request_id: str) -> torch.Tensor | None:
        if trace.buffer is None and trace.error is None:
            try:
                trace.buffer = self.probe.trace(min(trace.limit, step.tokens(request_id)))
            except torch.OutOfMemoryError as e:  # the step must go on
                trace.error = str(e).partition("\n")[0]
        return trace.buffer

    def leaves_slot(self, slot: int, adapter_id: int) -> None:
        """Take what a slot counted: it will be another adapter's."""
        if not self._tokens[slot]:
            return
        sums = self.probe.sums[slot]
        total = self._totals.get(adapter_id)
        if total is None:
            total = self._totals[adapter_id] = _Total(0, torch.zeros_like(sums), self._heads(slot))
        total.tokens += int(self._tokens[slot])
        total.sums += sums
        sums.zero_()
        self._tokens[slot] = 0

    def _heads(self, slot: int) -> npt.NDArray[np.int64]:
        """[routers] heads of each router of the adapter in the slot, 0 where there is none.

        A layer that the adapter does not adapt still has the layout of the slot's adapter before; nothing was counted.
        """
        layouts = [layout for slots in self.layers for layout in slots.layouts[slot] or [None] * len(slots.out_slices)]
        heads = np.array([layout.heads if layout is not None and layout.has_router else 0 for layout in layouts])
        counted: npt.NDArray[np.bool_] = self.probe.sums[slot].any(dim=1).cpu().numpy()
        return np.where(counted, heads, 0)

    def take(self, lora_index_to_id: Sequence[int | None]) -> dict[str, Any]:
        """What was counted since the last call, as plain data; begins anew.

        adapters: [(id, tokens, heads of each router, sums as float64 bytes [routers, heads + 1])].
        """
        for slot, adapter_id in enumerate(lora_index_to_id):
            if adapter_id is not None:
                self.leaves_slot(slot, adapter_id)
        adapters = [
            (adapter_id, total.tokens, total.heads.tolist(), total.sums.cpu().numpy().tobytes())
            for adapter_id, total in self._totals.items()
        ]
        steps = self._counted
        self._totals, self._counted = {}, 0
        return {"names": self.names, "width": self.probe.heads + 1, "adapters": adapters, "steps": steps}

    def start_trace(self, name: str, limit: int) -> None:
        """Record the first `limit` tokens of the request whose id contains `name`."""
        if self._is_first_rank():
            self._traces[name] = _Trace(limit)

    def finish_trace(self, name: str) -> dict[str, Any] | None:
        """names and heads of the routers that were seen, and their weights as float32 bytes [tokens, routers, heads];
        or error; None when no row of the request was computed here."""
        trace = self._traces.pop(name, None)
        if not self._traces:
            self.probe.set(count=False)
        if trace is not None and trace.error is not None:
            return {"error": trace.error}
        if trace is None or trace.buffer is None:
            return None
        weights = trace.buffer.cpu()  # waits for the steps that write into it
        heads = (~weights.isnan()).any(dim=0).sum(dim=1)
        seen = heads.nonzero().flatten().tolist()
        if not seen:
            return None
        kept = weights[:, seen, : int(heads.max())].contiguous()
        names = [self.names[i] for i in seen]
        return {"names": names, "heads": heads[seen].tolist(), "weights": kept.numpy().tobytes()}


def entropy_scale(heads: int) -> float:
    """What turns nats into a share of the entropy of equal weights."""
    return 1.0 / math.log(heads) if heads > 1 else 0.0


class RoutingCalls:
    """Part of `HydraWorkerExtension`: called through collective_rpc."""

    model_runner: Any

    # Sums that a step has made may only be changed in the mode in which the step ran.
    @torch.inference_mode()
    def hydra_take_counts(self) -> dict[str, Any]:
        """See `RoutingRecorder.take` and `SlotEvents.take`."""
        is_leader = get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank
        return {**self.model_runner.lora_manager.take_counts(), "is_leader": is_leader}

    @torch.inference_mode()
    def hydra_start_trace(self, name: str, limit: int) -> None:
        self.model_runner.lora_manager.routing.start_trace(name, limit)

    @torch.inference_mode()
    def hydra_finish_trace(self, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.model_runner.lora_manager.routing.finish_trace(name)
        return found
