"""Cells, turns and results, with a fake server in the place of real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_server import FakeServer

from hydraserve.adapters.checkpoint import inspect_adapter
from hydraserve.bench.arms import Arm, Comparison, Plan, ServerSpec, Shape, adapter_counts, compare, running_server
from hydraserve.bench.models import served_models
from hydraserve.bench.process import ServerProcess
from hydraserve.bench.result import Result
from hydraserve.bench.runner import Progress, Runner, Settings, engine_facts
from hydraserve.bench.workload import Lengths, Load, Workload
from hydraserve.config import KEY_VARIABLES
from hydraserve.errors import ConfigError, EngineError

WORKLOAD = Workload(1000, Lengths(4, 4), Lengths(3, 3))


def runner(fake: FakeServer, folder: Path, *, repeats: int = 2, batches: tuple[int, ...] = (1, 2)) -> Runner:
    comparison = running_server(fake.url, "base", ["one", "two"], [1, 2])
    settings = Settings([Load(concurrency=batch) for batch in batches], folder, repeats=repeats, waves=3)
    return Runner(comparison, WORKLOAD, settings, Result({}, comparison.baseline))


def test_arms_take_turns_within_each_repeat(fake_server: FakeServer, tmp_path: Path) -> None:
    measured = runner(fake_server, tmp_path)
    measured.run()
    cells = [(cell.load.concurrency, cell.arm.adapters) for cell in measured.result.cells]
    assert cells == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)], "three requests ask for two adapters in turn"
    warmups, runs = (2, 2, 2, 2, 2, 2), (3, 3, 3, 6, 6, 6)
    bodies = fake_server.bodies
    assert len(bodies) == sum(warmups) + 2 * (sum(warmups) + sum(runs))
    start = sum(warmups)
    repeats: list[list[list[dict[str, object]]]] = [[], []]
    for repeat in repeats:
        for warmup, run in zip(warmups, runs, strict=True):  # the server is woken before each run
            repeat.append(bodies[start + warmup : start + warmup + run])
            start += warmup + run
    first, second = repeats
    assert models(first) == [{"base"}, {"one"}, {"one", "two"}] * 2
    assert models(second) == [{"one", "two"}, {"one"}, {"base"}] * 2, "backwards, so that no arm always comes first"
    assert prompts(first[0]) == prompts(first[1]), "the same for each arm"
    assert prompts(first[3]) == prompts(first[5])
    assert not prompts(first[0]) & prompts(second[2]), "others in each repeat"


def models(runs: list[list[dict[str, object]]]) -> list[set[object]]:
    return [{body["model"] for body in run} for run in runs]


def prompts(bodies: list[dict[str, object]]) -> set[str]:
    return {str(body["prompt"]) for body in bodies}


def test_a_result_has_every_run_and_what_they_come_to(fake_server: FakeServer, tmp_path: Path) -> None:
    fake_server.next_s = 0.02
    measured = runner(fake_server, tmp_path, batches=(2,))
    measured.run()
    result = json.loads(json.dumps(measured.result.to_json()))
    assert result["complete"] is True
    assert result["servers"]["running"]["kv_cache_tokens"] == 1600
    base, one, both = result["cells"]
    assert [len(cell["runs"]) for cell in result["cells"]] == [2, 2, 2]
    for run in base["runs"]:
        assert run["metrics"]["requests"] == 6
        assert run["metrics"]["output_tokens"] == 18
        assert run["counters"] == {"vllm:generation_tokens": 18}
    values = [run["metrics"]["tpot_ms.p50"] for run in base["runs"]]
    assert min(values) > 15, "20 ms a token; a first one that is stamped late makes it less"
    assert base["over_repeats"]["tpot_ms.p50"]["min"] == min(values)
    ratios = [run["metrics"]["tpot_ms.p50"] / value for run, value in zip(one["runs"], values, strict=True)]
    assert one["ratios"]["tpot_ms.p50"]["max"] == pytest.approx(max(ratios))
    assert base["ratios"] == {}
    # "two" sends two tokens at a time and stops at the last even number
    assert both["runs"][0]["metrics"]["output_tokens"] == 3 * 3 + 3 * 2


class Stop(Progress):
    """Interrupts after some runs, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.left = after

    def run_done(self) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_an_interrupted_run_keeps_what_is_there(fake_server: FakeServer, tmp_path: Path) -> None:
    measured = runner(fake_server, tmp_path)
    saved: list[None] = []
    measured.on_run = lambda: saved.append(None)
    measured.progress = Stop(8)
    with pytest.raises(KeyboardInterrupt):
        measured.run()
    result = measured.result.to_json()
    assert result["complete"] is False
    assert [len(cell["runs"]) for cell in result["cells"]] == [1, 2, 2, 1, 1, 1], "backwards in the second repeat"
    assert result["cells"][3]["ratios"] == {}
    assert "tpot_ms.p50" in result["cells"][1]["over_repeats"]
    assert len(saved) == 7, "the run that was stopped after it counts, but was not saved any more"


def test_what_is_left_out_is_in_the_result(fake_server: FakeServer, tmp_path: Path) -> None:
    measured = runner(fake_server, tmp_path, repeats=1, batches=(1, 2))
    measured.settings = replace(measured.settings, waves=1)
    measured.run()
    (item,) = measured.result.to_json()["left_out"]
    assert (item["label"], item["load"]["concurrency"]) == ("adapters, 2 adapters", 1)
    assert item["why"] == "1 request a run cannot ask for 2 adapters in turn"


def test_nothing_to_compare_is_an_error_before_a_server_starts(tmp_path: Path) -> None:
    comparison = running_server("http://127.0.0.1:9", "base", ["one", "two"], [2])
    settings = Settings([Load(concurrency=1)], tmp_path, waves=1)
    with pytest.raises(ConfigError, match="cannot ask for 2 adapters"):
        Runner(comparison, WORKLOAD, settings, Result({})).run()


def test_a_server_that_asks_for_a_key_gets_it(fake_server: FakeServer, tmp_path: Path) -> None:
    fake_server.key = "secret"
    comparison = running_server(fake_server.url, *served_models(fake_server.url, "secret"), [1], "secret")
    assert "secret" not in repr(comparison)
    measured = Runner(comparison, WORKLOAD, Settings([Load(concurrency=1)], tmp_path, repeats=1), Result({}))
    measured.run()
    result = measured.result.to_json()
    assert result["servers"]["running"]["kv_cache_tokens"] == 1600
    assert [cell["runs"][0]["metrics"]["failed"] for cell in result["cells"]] == [0, 0]
    assert "secret" not in json.dumps(result)
    with pytest.raises(EngineError, match="--api-key"):
        served_models(fake_server.url)


def test_servers_of_a_comparison_ask_for_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = []

    class Started(ServerProcess):
        def start(self) -> ServerProcess:
            started.append(self.env)
            raise EngineError("start", "enough seen", "nothing", "none")

    monkeypatch.setattr("hydraserve.bench.runner.ServerProcess", Started)
    arm = Arm("off", "off", "off", "off", ("base",), 0)
    settings = Settings([Load(concurrency=1)], tmp_path)
    with pytest.raises(EngineError, match="enough seen"):
        Runner(Comparison((ServerSpec("off", "vllm"),), (arm,), None), WORKLOAD, settings, Result({})).run()
    assert {name: started[0][name] for name in KEY_VARIABLES} == dict.fromkeys(KEY_VARIABLES, "")


def test_an_arm_that_fails_to_warm_up_is_an_error(fake_server: FakeServer, tmp_path: Path) -> None:
    measured = runner(fake_server, tmp_path)
    (server,) = measured.comparison.servers
    arm = Arm("x", "missing adapter", "hydra", server.name, ("missing",), 1)
    measured.comparison = Comparison((server,), (arm,), None)
    with pytest.raises(EngineError, match=r"missing adapter, batch 1: 1 of 1 .*404"):
        measured.run()
    assert measured.result.complete is False


def test_errors_of_a_run_are_counted_and_kept(fake_server: FakeServer, tmp_path: Path) -> None:
    measured = runner(fake_server, tmp_path, repeats=1, batches=(2,))
    # Fine with the warm-up's two requests, an error afterwards.
    original = measured.warmup_requests
    (server,) = measured.comparison.servers
    measured.comparison = Comparison((server,), (Arm("x", "x", "hydra", server.name, ("one", "breaks"), 2),), None)

    def only_the_good(cell: object) -> object:
        return [request for request in original(cell) if request.model == "one"]  # type: ignore[arg-type]

    measured.warmup_requests = only_the_good  # type: ignore[method-assign,assignment]
    measured.run()
    (cell,) = measured.result.to_json()["cells"]
    assert cell["runs"][0]["metrics"]["failed"] == 3
    assert cell["runs"][0]["errors"] == ["unreadable stream: the stream broke off"] * 3


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    shapes = {f"layers.{i}.{name}": (8, 8) for i in range(2) for name in ("q_proj", "up_proj")} | {"lm_head": (8, 32)}

    def make(**changes: object) -> Plan:
        made = Plan(
            model="/models/m",
            base_shapes=shapes,
            shapes=[Shape(4, 3)],
            counts=[1, 2],
            kinds=["off", "base-only", "hydra", "lora", "lora-wide", "reference"],
            engine_flags=["--enforce-eager"],
            vllm_rank=lambda rank: max(8, rank),
            folder=tmp_path,
        )
        return replace(made, **changes)  # type: ignore[arg-type]

    return make


def test_the_whole_comparison(plan: Callable[..., Plan]) -> None:
    made = compare(plan())
    servers = {server.name: server for server in made.servers}
    assert list(servers) == ["off", "hydra-r4-e3", "lora-r4", "lora-r12", "reference"]
    assert made.baseline == "off"
    for server in (servers["off"], servers["hydra-r4-e3"], servers["lora-r4"], servers["lora-r12"]):
        assert server.arguments[:5] == ("--model", "/models/m", "--served-model-name", "base", "--enforce-eager")
    assert "--enable-lora" not in servers["off"].arguments
    assert servers["off"].kind == servers["lora-r4"].kind == "vllm"
    assert [arm.name for arm in made.arms] == [
        "off",
        "base-only",
        *("hydra-r4-e3-1", "hydra-r4-e3-2", "lora-r4-1", "lora-r4-2", "lora-r12-1", "lora-r12-2"),
        *("reference-1", "reference-2"),
    ]
    assert {arm.label for arm in made.arms if arm.server == "lora-r12"} == {
        "vLLM LoRA r12, 1 adapter",
        "vLLM LoRA r12, 2 adapters",
    }


def test_adapters_of_a_comparison_have_equal_parameters(plan: Callable[..., Plan]) -> None:
    servers = {server.name: server for server in compare(plan()).servers}
    found = {name: inspect_adapter(server.adapters["a1"]) for name, server in servers.items() if server.adapters}
    assert {name: (s.rank, s.heads, s.format) for name, s in found.items()} == {
        "hydra-r4-e3": (4, 3, "hydralora"),
        "lora-r4": (4, 1, "lora"),
        "lora-r12": (12, 1, "lora"),
        "reference": (4, 3, "hydralora"),
    }
    assert all(summary.targets == ("q_proj", "up_proj") for summary in found.values()), "not lm_head"
    assert servers["reference"].adapters == servers["hydra-r4-e3"].adapters


def test_control_is_a_second_server_like_the_first(plan: Callable[..., Plan]) -> None:
    made = compare(plan(kinds=["off", "control"]))
    off, control = made.servers
    assert replace(control, name="off") == off
    assert [arm.server for arm in made.arms] == ["off", "control"]
    assert made.baseline == "off"


def test_vllms_own_lora_gets_the_same_slots_and_modules(plan: Callable[..., Plan]) -> None:
    (server,) = compare(plan(kinds=["lora-wide"], slots=1, targets=["q_proj"])).servers
    arguments = " ".join(server.arguments)
    assert "--enable-lora --max-loras 1 --max-cpu-loras 2 --max-lora-rank 12 --lora-target-modules q_proj" in arguments
    assert compare(plan(kinds=["hydra"])).baseline is None


def test_layers_that_the_base_does_not_have_are_refused(plan: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match=r"qproj.*q_proj, up_proj"):
        compare(plan(targets=["qproj"]))


def test_given_adapters_take_the_place_of_random_ones(plan: Callable[..., Plan], tmp_path: Path) -> None:
    folders = {"sql": tmp_path / "sql", "chat": tmp_path / "chat"}
    made = compare(plan(shapes=[Shape(4, 3, folders)], kinds=["hydra"], slots=5))
    (server,) = made.servers
    assert f"--slots 5 --adapter sql={folders['sql']} --adapter chat={folders['chat']}" in " ".join(server.arguments)
    assert [arm.models for arm in made.arms] == [("sql",), ("sql", "chat")]


def test_a_running_server_is_asked_what_it_serves(fake_server: FakeServer) -> None:
    assert served_models(fake_server.url) == ("base", ["one", "two"])
    with pytest.raises(EngineError, match="check --url"):
        served_models("http://127.0.0.1:9")


def test_a_running_server_without_adapters(fake_server: FakeServer) -> None:
    assert [arm.name for arm in running_server(fake_server.url, "base", [], []).arms] == ["base-only"]


@pytest.mark.parametrize(
    ("asked", "there", "counts"),
    [
        (None, None, [1, 8]),
        (None, 0, []),
        (None, 2, [1, 2]),
        (None, 12, [1, 8, 12]),
        ([4, 1, 4], None, [1, 4]),
        ([2], 3, [2]),
    ],
)
def test_numbers_of_adapters(asked: list[int] | None, there: int | None, counts: list[int]) -> None:
    assert adapter_counts(asked, there) == counts


def test_more_adapters_asked_for_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"(?s)--adapters: got 8.*no more than the 2 adapters that there are"):
        adapter_counts([1, 8], 2)
    with pytest.raises(ConfigError, match="no more than the 1 adapter that there is"):
        adapter_counts([2], 1)


def test_engine_facts_come_from_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("x compilation_config={'mode': <CompilationMode.NONE: 0>, 'a': 1}\n local_rank=0, core ids=[0, 1]\n")
    assert engine_facts(log) == {"compilation": "NONE", "engine_cores": "0, 1"}
    log.write_text("nothing of the kind")
    assert engine_facts(log) == {}


def test_results_hold_no_local_paths(fake_server: FakeServer, tmp_path: Path) -> None:
    spec = ServerSpec(
        "s",
        "running",
        ("--model", "/home/me/base", "--adapter", "a=/tmp/x/a", '{"path": "/tmp/y/b"}', "org/name", "http://h/p"),
        url=fake_server.url,
    )
    settings = Settings([Load(concurrency=1)], tmp_path, repeats=1, waves=1)
    measured = Runner(
        Comparison((spec,), (Arm("b", "b", "off", "s", ("base",), 0),), None), WORKLOAD, settings, Result({})
    )
    measured.run()
    assert measured.result.servers["s"]["arguments"] == [
        *("--model", "base", "--adapter", "a=a", '{"path": "b"}', "org/name", "http://h/p"),
    ]
