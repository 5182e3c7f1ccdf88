"""What the engine and the requests tell, as series: with an engine and a service that say what a test wants."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_metrics import Hooks, Server, counted
from prometheus_client.parser import text_string_to_metric_families

from hydraserve.adapters.observation import EngineCounts, SlotCounts
from hydraserve.adapters.runtime import Residency
from hydraserve.errors import EngineError
from hydraserve.server.lifecycle.served import RequestScope, current_scope


def test_requests_are_counted_by_adapter_and_outcome() -> None:
    server = Server()
    for adapter, outcome in (("sql", "stop"), ("sql", "abort"), (None, "length")):
        server.request(adapter, outcome)
    assert server.value("adapter_requests_total", adapter="sql", outcome="stop") == 1
    assert server.value("adapter_requests_total", adapter="base", outcome="length") == 1
    assert server.value("adapter_prompt_tokens_total", adapter="sql") == 10
    assert server.value("adapter_generated_tokens_total", adapter="sql") == 14
    assert server.value("adapter_time_to_first_token_seconds_sum", adapter="sql") == 1.0
    assert server.value("adapter_time_per_output_token_seconds_sum", adapter="sql") == 0.5
    assert server.value("adapter_request_duration_seconds_count", adapter="sql") == 2


def test_routers_are_added_up_over_layers_and_scrapes() -> None:
    async def scenario(server: Server) -> None:
        server.service.serve("sql", 7)
        server.request("sql")
        server.engine.counts = [counted(7, 999, 999, 0), counted(7, 100, 60, 40), counted(7, 50, 50, 0)]
        await server.start()  # takes what was counted in the warm-up
        await server.refresh()
        await server.refresh()

    server = Server()
    asyncio.run(scenario(server))
    labels = {"adapter": "sql", "module": "up_proj"}
    assert server.value("router_tokens_total", **labels) == 300
    assert server.value("router_weight_total", **labels, head="0") == 220
    assert server.value("router_weight_total", **labels, head="1") == 80
    assert server.value("router_entropy_total", **labels) == 150
    assert server.value("router_sampled_steps_total") == 6
    assert server.value("router_collapsed_ratio", adapter="sql") == 0


def test_the_engine_is_asked_once_a_second_and_its_errors_leave_what_was() -> None:
    async def scenario(server: Server) -> None:
        server.service.serve("sql", 7)
        server.request("sql")
        await server.start()
        server.engine.counts = [counted(7, 10, 10, 0), counted(7, 10, 10, 0)]
        await server.refresh()
        await server.metrics.refresh()
        assert len(server.engine.counts) == 1
        server.engine.counts.insert(0, EngineError("call", "a timeout", "an answer"))
        await server.refresh()
        await server.refresh()

    server = Server()
    asyncio.run(scenario(server))
    assert server.value("router_tokens_total", adapter="sql", module="up_proj") == 40


def test_a_fault_of_ours_is_told_and_not_fatal(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Server) -> None:
        await server.start()
        server.engine.counts = [ValueError("a fault")]
        await server.refresh()
        await server.refresh()

    asyncio.run(scenario(Server()))
    assert [record.message for record in caplog.records] == ["metrics: ValueError('a fault')"]


def test_places_of_adapters() -> None:
    async def scenario(server: Server) -> None:
        for name, adapter_id in (("a", 1), ("b", 2), ("c", 3)):
            server.service.serve(name, adapter_id)
            server.request(name)
        server.service.held = Residency({1: 100, 2: 50}, (None, 1), 0, 0, 0, 0)
        slots = SlotCounts(loads={1: 2, 9: 1}, evictions={1: 1}, hits=5, misses=3)
        await server.start()
        server.engine.counts = [EngineCounts({}, 0, slots)]
        await server.runtime.load(1, "path", "digest")
        await server.runtime.unload(9)
        await server.refresh()

    server = Server()
    asyncio.run(scenario(server))
    states = {
        name: [server.value("adapter_state", adapter=name, state=s) for s in ("slot", "host", "disk")] for name in "abc"
    }
    assert states == {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1]}
    assert server.value("adapter_bytes", adapter="a") == 100
    assert (server.value("slots"), server.value("slots_used")) == (2, 1)
    assert (server.value("host_cache_capacity"), server.value("host_cache_adapters")) == (4, 2)
    assert server.value("host_cache_bytes") == 150
    assert (server.value("slot_hits_total"), server.value("slot_misses_total")) == (5, 3)
    assert server.value("adapter_loads_total", adapter="a", place="slot") == 2
    assert server.value("adapter_loads_total", adapter="other", place="slot") == 1, "one that is gone already"
    assert server.value("adapter_loads_total", adapter="a", place="host") == 1
    assert server.value("adapter_load_seconds_count", adapter="a") == 1
    assert server.value("adapter_evictions_total", adapter="a", place="slot") == 1
    assert server.value("adapter_evictions_total", adapter="other", place="host") == 1


def test_running_and_waiting_requests() -> None:
    async def scenario(server: Server) -> None:
        server.service.serve("a", 1, waiting=2)  # for the adapter, before the engine knows them
        server.request("a")
        await server.start()
        server.engine.in_flight = {"a@d1": (3, 1), None: (2, 0)}
        await server.refresh()
        assert server.value("adapter_requests_running", adapter="a") == 3
        assert server.value("adapter_requests_waiting", adapter="a") == 3
        assert server.value("adapter_requests_running", adapter="base") == 2
        server.service.serve("a", 1)
        server.engine.in_flight = {}
        await server.refresh()
        assert server.value("adapter_requests_running", adapter="a") == 0
        assert server.value("adapter_requests_waiting", adapter="a") == 0

    asyncio.run(scenario(Server()))


def test_what_a_request_waits_for_before_the_engine_knows_of_it_counts() -> None:
    server, scope = Server(), RequestScope()
    token = current_scope.set(scope)
    try:
        scope.waited = 1.5
        server.request("sql")
    finally:
        current_scope.reset(token)
    assert server.value("adapter_time_to_first_token_seconds_sum", adapter="sql") == 2.0
    assert server.value("adapter_request_duration_seconds_sum", adapter="sql") == 3.5
    assert server.value("adapter_time_per_output_token_seconds_sum", adapter="sql") == 0.25


def test_a_request_waits_while_its_adapter_is_read_and_may_end_there() -> None:
    async def scenario(server: Server) -> None:
        hooks = Hooks()
        server.runtime.hooks = hooks  # type: ignore[assignment]
        server.service.registered = {"sql", "broken"}
        await server.start()
        ready = server.engine_hooks().ready
        reading = [asyncio.create_task(ready(name)) for name in ("sql", "sql", "broken", "unheard of")]
        await asyncio.sleep(0)
        await server.refresh()
        assert server.waiting() == 3
        reading[0].cancel()  # its client leaves
        hooks.error = EngineError("adapter", "a full disk", "room")
        hooks.gate.set()
        await asyncio.gather(*reading, return_exceptions=True)
        await server.refresh()
        assert server.waiting() == 0

    server = Server()
    asyncio.run(scenario(server))
    assert server.value("adapter_requests_total", adapter="sql", outcome="abort") == 1
    assert server.value("adapter_requests_total", adapter="sql", outcome="error") == 1
    assert server.value("adapter_requests_total", adapter="broken", outcome="error") == 1
    assert server.value("adapter_request_duration_seconds_count", adapter="broken") == 1
    assert server.adapters() == {"sql", "broken"}, "names that nobody registered make no series"


def test_a_look_up_is_a_hit_or_a_miss_once_for_each_request() -> None:
    async def scenario(server: Server) -> None:
        hooks = Hooks()
        hooks.gate.set()
        server.runtime.hooks = hooks  # type: ignore[assignment]
        for adapter_id, name in enumerate(("ready", "on disk")):
            server.service.serve(name, adapter_id)
        await server.start()
        current_scope.set(RequestScope())
        for name in ("ready", "ready", "on disk"):
            await server.engine_hooks().ready(name)

    server = Server()
    asyncio.run(scenario(server))
    assert (server.value("host_cache_hits_total"), server.value("host_cache_misses_total")) == (1, 1)


def test_adapters_of_the_start_have_series_before_their_first_request() -> None:
    async def scenario(server: Server) -> None:
        await server.runtime.load(1, "path", "digest")
        server.service.serve("sql", 1)
        server.service.held = Residency({1: 100}, (None, None), 0, 0, 0, 0)
        await server.start()
        await server.refresh()

    server = Server()
    asyncio.run(scenario(server))
    assert server.value("adapter_loads_total", adapter="sql", place="host") == 1
    assert server.value("adapter_state", adapter="sql", state="host") == 1
    assert server.value("adapter_bytes", adapter="sql") == 100
    assert server.adapters() == {"sql"}


def test_an_adapter_that_comes_and_goes_between_scrapes_has_its_own_series() -> None:
    async def scenario(server: Server) -> None:
        hooks = Hooks()
        hooks.gate.set()
        server.runtime.hooks = hooks  # type: ignore[assignment]
        await server.start()
        await server.runtime.load(1, "path", "digest")
        server.service.serve("brief", 1)
        await server.engine_hooks().ready("brief")
        server.request("brief")
        del server.service.current["brief"]
        await server.runtime.unload(1)
        server.engine.counts = [counted(1, 10, 10, 0)]
        await server.refresh()

    server = Server()
    asyncio.run(scenario(server))
    assert server.value("router_tokens_total", adapter="brief", module="up_proj") == 20
    assert server.value("adapter_loads_total", adapter="brief", place="host") == 1
    assert server.value("adapter_evictions_total", adapter="brief", place="host") == 1


@pytest.mark.parametrize("names", [("busy", "idle"), ("idle", "busy")])
def test_of_two_names_of_one_content_the_one_with_a_label_is_shown(names: tuple[str, str]) -> None:
    async def scenario(server: Server) -> None:
        for name in names:
            server.service.serve(name, 1)
        for _ in range(3):
            server.request("busy")
        await server.start()
        server.engine.counts = [counted(1, 10, 10, 0)]
        await server.refresh()

    server = Server(size=1)
    asyncio.run(scenario(server))
    assert server.value("router_tokens_total", adapter="busy", module="up_proj") == 20


def test_slots_of_data_parallel_engines_are_added_up() -> None:
    async def scenario(server: Server) -> None:
        for adapter_id, name in enumerate("abc"):
            server.service.serve(name, adapter_id)
        server.service.held = Residency({0: 1, 1: 1}, (None, 0, 1, 0), 0, 0, 0, 0)  # two engines of two slots
        await server.start()
        await server.refresh()

    server = Server()
    asyncio.run(scenario(server))
    assert (server.value("slots"), server.value("slots_used")) == (4, 3)
    assert [server.value("adapter_state", adapter=name, state="slot") for name in "abc"] == [1, 1, 0]


def test_a_collapse_ends_with_its_adapter() -> None:
    async def scenario(server: Server) -> None:
        server.service.serve("sql", 1)
        server.request("sql")
        await server.start()
        server.engine.counts = [counted(1, 500, 500, 0)]
        await server.refresh()
        assert server.value("router_collapsed_ratio", adapter="sql") == 1
        server.service.current.clear()
        await server.refresh()
        assert server.value("router_collapsed_ratio", adapter="sql") == 0

    asyncio.run(scenario(Server()))


SHARED = """
import asyncio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from fake_metrics import Server, counted

async def scenario(server):
    for adapter_id, name in enumerate("ab"):
        server.service.serve(name, adapter_id)
    server.request("a")
    await server.start()
    server.engine.in_flight = {"a@d1": (3, 1)}
    server.engine.counts = [counted(0, 500, 500, 0)]
    await server.refresh()
    server.engine.in_flight = {}
    for _ in range(5):
        server.request("b")
    await server.refresh()

asyncio.run(scenario(Server(size=1)))
merged = CollectorRegistry()
MultiProcessCollector(merged)
print(generate_latest(merged).decode())
"""


def test_gauges_of_a_label_that_is_given_up_fall_to_zero_where_processes_share_metrics(tmp_path: Path) -> None:
    """prometheus_client chooses how it keeps values when it is imported, so in a process of its own."""
    here = Path(__file__).parent
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(here), *sys.path])
    done = subprocess.run([sys.executable, "-c", SHARED], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = {
        sample.labels["adapter"]: sample.value
        for family in text_string_to_metric_families(done.stdout)
        for sample in family.samples
        if sample.name == "hydraserve_adapter_requests_running"
    }
    assert shown["a"] == 0
    assert 'hydraserve_router_collapsed_ratio{adapter="a"} 0.0' in done.stdout
    assert 'hydraserve_adapter_requests_total{adapter="b",outcome="stop"}' in done.stdout


def test_an_adapter_that_loses_its_label_loses_its_series() -> None:
    async def scenario(server: Server) -> None:
        for name, adapter_id in (("a", 1), ("b", 2)):
            server.service.serve(name, adapter_id)
        server.request("a")
        await server.start()
        server.engine.counts = [counted(1, 10, 10, 0)]
        await server.refresh()
        assert "a" in server.adapters()
        for _ in range(5):
            server.request("b")
        server.engine.counts = [counted(1, 10, 10, 0)]
        await server.refresh()

    server = Server(size=1)
    asyncio.run(scenario(server))
    assert server.adapters() == {"b", "other"}
    assert server.value("router_tokens_total", adapter="other", module="up_proj") == 20
