"""What a worker counts and traces belongs to the right adapter and request, whatever moves between slots and steps."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra_kernels import HydraWeights, Layout, SlotCapacity, StepMetadata, linear_, make_slots
from hydra_kernels.reference import routing_weights
from hydra_kernels.testing import random_weights

from hydraserve.engine import routing
from hydraserve.engine.client import EngineAdapters
from hydraserve.engine.observation import merge_counts, merge_traces
from hydraserve.engine.routing import RoutingCalls, RoutingRecorder, SlotEvents, Step, StepRequests
from hydraserve.errors import BusyError

N_IN, OUT, MAX_TOKENS, HEADS = 24, (16, 8), 12, 4
NAMES = ("layers.0.q_proj", "layers.0.k_proj")


class Worker:
    """One merged layer with two slots, and a recorder; a step is run as vLLM's runner would."""

    def __init__(self, every: int = 1) -> None:
        self.slots = make_slots(2, N_IN, OUT, SlotCapacity(rows=12, k=32, heads=HEADS), torch.float32, "cpu")
        self.recorder = RoutingRecorder([(NAMES, self.slots)], MAX_TOKENS, HEADS, every)
        self.meta = StepMetadata(MAX_TOKENS, 2)
        self.ids: list[int | None] = [None, None]
        self.loaded: dict[int, list[HydraWeights]] = {}
        self.step = Step()
        self.seen: set[str] = set()
        self.generator = torch.Generator().manual_seed(0)

    def load(self, slot: int, adapter_id: int, heads: int) -> None:
        old = self.ids[slot]
        if old is not None:
            self.recorder.leaves_slot(slot, old)
        layout = Layout(4, heads, has_router=heads > 1)
        weights = [random_weights(N_IN, out, layout, torch.float32, 10 * adapter_id + i) for i, out in enumerate(OUT)]
        self.slots.load(slot, weights)
        self.ids[slot], self.loaded[adapter_id] = adapter_id, weights

    def run(self, rows: dict[str, tuple[int, int, int]], dummy: bool = False) -> torch.Tensor:
        """rows: request -> (adapter id, first position, rows). Returns x."""
        if not dummy:
            new = [new_request(name, first) for name, (_, first, _) in rows.items()]
            is_new = [r.req_id not in self.seen for r in new]
            self.seen.update(rows)
            cached = _cached([r for r, first_time in zip(new, is_new, strict=True) if not first_time])
            new = [r for r, first_time in zip(new, is_new, strict=True) if first_time]
            self.step.scheduled = SimpleNamespace(scheduled_new_reqs=new, scheduled_cached_reqs=cached)
            self.step.requests = StepRequests(list(rows), np.array([n for _, _, n in rows.values()], dtype=np.int32))
        slots = [self.ids.index(i) if i in self.ids else -1 for i, _, n in rows.values() for _ in range(n)]
        array = np.array(slots, dtype=np.int32)
        self.recorder.prepare(array, self.step)
        self.meta.update(array)
        x = torch.randn(len(slots), N_IN, generator=self.generator)
        linear_(torch.zeros(len(slots), sum(OUT)), x, self.slots, self.meta)
        return x

    def weights(self, adapter_id: int, x: torch.Tensor) -> torch.Tensor:
        """[T, 2, E] of the reference."""
        return torch.stack([routing_weights(x, part) for part in self.loaded[adapter_id]], dim=1)

    def take(self) -> dict[int, dict[str, object]]:
        taken = {**self.recorder.take(self.ids), "slots": SlotEvents().take(), "is_leader": True}
        return {i: dict(found) for i, found in merge_counts([taken]).routers.items()}


def new_request(name: str, computed: int, prompt: int = 4, max_tokens: int = 4) -> SimpleNamespace:
    """As vLLM's scheduler describes it."""
    params = SimpleNamespace(max_tokens=max_tokens)
    return SimpleNamespace(
        req_id=name, num_computed_tokens=computed, prompt_token_ids=[0] * prompt, sampling_params=params
    )


def _cached(requests: list[SimpleNamespace]) -> SimpleNamespace:
    return SimpleNamespace(
        req_ids=[r.req_id for r in requests], num_computed_tokens=[r.num_computed_tokens for r in requests]
    )


@pytest.fixture(autouse=True)
def first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "get_tensor_model_parallel_rank", lambda: 0)


def test_counts_are_the_reference_s_sums_and_begin_anew() -> None:
    worker = Worker()
    worker.load(0, 7, heads=4)
    worker.load(1, 9, heads=2)
    x = worker.run({"a": (7, 0, 5), "base": (0, 0, 1), "b": (9, 3, 2)})
    counts = worker.take()
    for adapter_id, rows, heads in ((7, slice(0, 5), 4), (9, slice(6, 8), 2)):
        w = worker.weights(adapter_id, x[rows])
        entropy = -(w * w.log()).sum(-1).sum(0) / np.log(heads)
        for i, name in enumerate(NAMES):
            count = counts[adapter_id][name]
            assert count.tokens == w.shape[0]  # type: ignore[attr-defined]
            assert count.weights == pytest.approx(w[:, i].sum(0).tolist(), abs=1e-5)  # type: ignore[attr-defined]
            assert count.entropy == pytest.approx(float(entropy[i]), abs=1e-5)  # type: ignore[attr-defined]
    assert worker.take() == {}


def test_a_slot_that_changes_hands_mid_way_keeps_the_counts_apart() -> None:
    worker = Worker()
    worker.load(0, 7, heads=4)
    worker.run({"a": (7, 0, 3)})
    worker.load(0, 8, heads=3)
    worker.run({"b": (8, 0, 5)})
    worker.load(0, 7, heads=4)
    worker.run({"a": (7, 3, 1)})
    counts = worker.take()
    assert {i: found[NAMES[0]].tokens for i, found in counts.items()} == {7: 4, 8: 5}  # type: ignore[attr-defined]
    assert sum(counts[8][NAMES[1]].weights) == pytest.approx(5)  # type: ignore[attr-defined]


def test_layers_that_only_the_slot_s_adapter_before_had_are_not_counted() -> None:
    worker = Worker()
    worker.load(0, 7, heads=4)
    worker.run({"a": (7, 0, 3)})
    assert worker.take().keys() == {7}
    worker.slots.clear(0)  # as the engine does where an adapter has no weights for the layer
    worker.ids[0] = 8
    worker.run({"b": (8, 0, 5)})
    assert worker.take().get(8, {}) == {}


def test_dummy_steps_plain_lora_and_unsampled_steps_are_not_counted() -> None:
    worker = Worker(every=3)
    worker.load(0, 7, heads=4)
    worker.load(1, 9, heads=1)
    worker.run({"a": (7, 0, 4), "p": (9, 0, 2)}, dummy=True)
    for _ in range(7):
        worker.run({"a": (7, 0, 1), "p": (9, 0, 1)})
    taken = worker.recorder.take(worker.ids)
    assert taken["steps"] == 2  # the third and the sixth
    counts = merge_counts([{**taken, "slots": SlotEvents().take(), "is_leader": True}]).routers
    assert counts[7][NAMES[0]].tokens == 2
    assert not counts.get(9)


def test_a_trace_follows_its_request_through_chunks_and_preemption() -> None:
    worker = Worker(every=0)
    worker.load(0, 7, heads=4)
    worker.recorder.start_trace("wanted", 8)
    first = worker.run({"other": (7, 0, 2), "cmpl-wanted-0": (7, 0, 4)})
    worker.run({"cmpl-wanted-0": (7, 4, 1)})  # preempted after this: it begins again
    again = worker.run({"cmpl-wanted-0": (7, 0, 5), "other": (7, 2, 1)})
    last = worker.run({"cmpl-wanted-0": (7, 5, 1)})
    found = worker.recorder.finish_trace("wanted")
    assert found is not None
    trace = merge_traces([found])
    assert trace.routers == tuple(sorted(NAMES))
    assert trace.heads == (4, 4)
    order = [NAMES.index(name) for name in trace.routers]
    expected = torch.cat([worker.weights(7, again[:5]), worker.weights(7, last)])[:, order]
    np.testing.assert_allclose(trace.weights[:6], expected, atol=1e-6)
    assert np.isnan(trace.weights[6:]).all()
    assert not np.allclose(trace.weights[:4], worker.weights(7, first[2:])[:, order])


def test_after_a_trace_nothing_is_written_any_more() -> None:
    worker = Worker(every=0)
    worker.load(0, 7, heads=4)
    worker.recorder.start_trace("wanted", 4)
    worker.run({"wanted": (7, 0, 2)})
    assert worker.recorder.probe.active
    assert worker.recorder.finish_trace("wanted") is not None
    assert not worker.recorder.probe.active
    worker.run({"wanted": (7, 2, 1)})
    assert not worker.recorder.probe.active
    assert worker.recorder.finish_trace("wanted") is None


def test_a_trace_is_as_long_as_its_request_and_no_longer_than_its_limit() -> None:
    worker = Worker(every=0)
    worker.load(0, 7, heads=4)
    for limit, tokens in ((100, 8), (3, 3)):
        worker.recorder.start_trace(f"wanted-{limit}", limit)
        worker.run({f"wanted-{limit}": (7, 0, 5)})
        found = worker.recorder.finish_trace(f"wanted-{limit}")
        assert found is not None
        assert merge_traces([found]).weights.shape[0] == tokens


def test_without_memory_for_a_trace_the_step_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(every=0)
    worker.load(0, 7, heads=4)

    def full(_: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory\nwith details")

    monkeypatch.setattr(worker.recorder.probe, "trace", full)
    worker.recorder.start_trace("wanted", 8)
    worker.run({"wanted": (7, 0, 2)})
    found = worker.recorder.finish_trace("wanted")
    assert found == {"error": "no memory"}
    with pytest.raises(BusyError, match="no memory"):
        merge_traces([found])


def test_a_request_without_a_router_leaves_an_empty_trace() -> None:
    worker = Worker(every=0)
    worker.load(0, 9, heads=1)
    worker.recorder.start_trace("wanted", 4)
    worker.run({"wanted": (9, 0, 2)})
    assert worker.recorder.finish_trace("wanted") is None
    assert merge_traces([]).routers == ()


def test_other_ranks_of_a_tensor_parallel_group_record_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "get_tensor_model_parallel_rank", lambda: 1)
    worker = Worker()
    worker.load(0, 7, heads=4)
    worker.recorder.start_trace("a", 4)
    worker.run({"a": (7, 0, 3)})
    assert worker.take() == {}
    assert worker.recorder.finish_trace("a") is None


def test_engines_are_added_up_and_stages_put_together() -> None:
    def answer(names: list[str], tokens: int, weights: list[list[float]], is_leader: bool) -> dict[str, object]:
        sums = np.array([[*row, 0.5] for row in weights], dtype=np.float64)
        slots = {"loads": [(7, 1)], "evictions": [], "hits": 3, "misses": 1}
        adapters = [(7, tokens, [len(weights[0])] * len(names), sums.tobytes())]
        base = {"names": names, "width": sums.shape[1], "adapters": adapters}
        return {**base, "steps": 10, "slots": slots, "is_leader": is_leader}

    stage_of_both = [("layers.0.q", [[1.0, 3.0]]), ("layers.1.q", [[2.0, 2.0]])]
    answers = [
        answer([name], 4, weights, is_leader=i == 0)
        for _ in range(2)
        for i, (name, weights) in enumerate(stage_of_both)
    ]
    merged = merge_counts(answers)
    assert {name: (c.tokens, c.weights) for name, c in merged.routers[7].items()} == {
        "layers.0.q": (8, (2.0, 6.0)),
        "layers.1.q": (8, (4.0, 4.0)),
    }
    assert (merged.steps, merged.slots.hits, merged.slots.misses, merged.slots.loads) == (20, 6, 2, {7: 2})


def test_only_requests_that_begin_hit_their_slot() -> None:
    step, events = Step(), SlotEvents()
    assert not step.begins(1), "before the first step"
    for new, in_slot in (([1], False), ([], True), ([1], True), ([None, 2], True), ([], False)):
        requests = [SimpleNamespace(lora_request=i and SimpleNamespace(lora_int_id=i)) for i in new]
        step.scheduled = SimpleNamespace(scheduled_new_reqs=requests)
        events.looked_up(1, in_slot, step.begins(1))
    taken = events.take()
    assert (taken["hits"], taken["misses"], taken["loads"]) == (1, 2, [(1, 2)])


def test_slots_of_all_engines_and_the_host_memory_of_the_fullest_worker() -> None:
    class Core:
        """Two data-parallel engines of two workers each."""

        async def call_utility_all_async(self, method: str, *args: object) -> list[object]:
            if method == "hydra_count_blocks":
                return [(10, 8, 1), (10, 9, 0)]
            slots = [[7, None], [8, 7]]
            return [
                [{"host": [(7, 100 + w), (8, 50)], "slots": slots[e], "process_bytes": 10 * e + w} for w in range(2)]
                for e in range(2)
            ]

    found = asyncio.run(EngineAdapters(SimpleNamespace(engine_core=Core())).residency())
    assert found.slots == (7, None, 8, 7)
    assert found.host == {7: 101, 8: 50}
    assert (found.blocks, found.free_blocks, found.cached_blocks, found.process_bytes) == (20, 17, 1, 11)


def test_traces_of_stages_join_in_the_order_of_layers() -> None:
    def part(name: str, heads: int, value: float) -> dict[str, object]:
        weights = np.full((3, 1, heads), value, dtype=np.float32)
        return {"names": [name], "heads": [heads], "weights": weights.tobytes()}

    trace = merge_traces([part("layers.10.q", 2, 0.5), part("layers.9.q", 4, 0.25)])
    assert trace.routers == ("layers.9.q", "layers.10.q")
    assert trace.heads == (4, 2)
    assert trace.weights.shape == (3, 2, 4)
    assert np.isnan(trace.weights[:, 1, 2:]).all()
    assert (trace.weights[:, 0] == 0.25).all()


def test_counts_that_a_step_made_can_be_taken_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run in inference mode, whose tensors may not be changed outside it; calls from the server come outside."""
    monkeypatch.setattr(routing, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True))
    worker, calls = Worker(), RoutingCalls()
    manager = SimpleNamespace(take_counts=lambda: {**worker.recorder.take(worker.ids), "slots": SlotEvents().take()})
    calls.model_runner = SimpleNamespace(lora_manager=manager)
    with torch.inference_mode():
        worker.load(0, 7, heads=4)
        worker.run({"a": (7, 0, 3)})
        worker.load(0, 8, heads=2)  # what 7 counted becomes a total inside the step
        worker.load(1, 7, heads=4)
        worker.run({"b": (7, 0, 2), "c": (8, 0, 1)})
    found = merge_counts([calls.hydra_take_counts()]).routers
    assert {adapter: next(iter(counts.values())).tokens for adapter, counts in found.items()} == {7: 5, 8: 1}
