"""/metrics under traffic: every series, exact counts, promtool's opinion, and a real Prometheus that scrapes it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from adapter_client import TARGETS, AdapterClient, wait_for, write_adapters
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from hydraserve.bench.process import ServerProcess, free_port
from hydraserve.metrics import Metrics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "deploy"))
from dashboard_queries import dashboard_queries

DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"
LAYERS = 30


@dataclass(frozen=True)
class Scrape:
    """What /metrics showed at one moment."""

    text: str

    def samples(self) -> Iterator[Sample]:
        for family in text_string_to_metric_families(self.text):
            yield from family.samples

    def value(self, name: str, **labels: str) -> float:
        """Sum over the samples of this name that have these labels."""
        return sum(s.value for s in self.samples() if s.name == name and labels.items() <= s.labels.items())

    def labels(self, name: str, label: str, **labels: str) -> set[str]:
        return {s.labels[label] for s in self.samples() if s.name == name and labels.items() <= s.labels.items()}


@pytest.fixture(scope="module")
def adapters(server: ServerProcess) -> Iterator[AdapterClient]:
    client = AdapterClient(server.url)
    with client.http:
        yield client


def scrape(adapters: AdapterClient) -> Scrape:
    return Scrape(adapters.http.get("/metrics").text)


def wait_until(adapters: AdapterClient, name: str, expected: float, **labels: str) -> Scrape:
    """The scrape that shows this value. The server asks its engine at most once a second, so it may take a moment."""
    found = [scrape(adapters)]

    def shown() -> bool:
        found[0] = scrape(adapters)
        return found[0].value(name, **labels) == pytest.approx(expected, rel=1e-6)

    wait_for(shown, f"{name} {labels} to be {expected}")
    return found[0]


@pytest.fixture(scope="module")
def fresh(demo_model: Path, tmp_path_factory: pytest.TempPathFactory, adapters: AdapterClient) -> Iterator[list[str]]:
    """Names of adapters that no other test uses, so that they count from zero: rank 4 with 3 heads, rank 8 with 2."""
    folder = tmp_path_factory.mktemp("fresh")
    names = ["fresh-a", "fresh-b"]
    for name, path in zip(names, write_adapters(demo_model, folder, 2), strict=True):
        adapters.add(name, path)
    yield names
    for name in names:
        adapters.remove(name)


def test_requests_are_counted_exactly(adapters: AdapterClient, fresh: list[str]) -> None:
    name, prompt, generated = fresh[0], 11, 7
    for i in range(3):
        assert adapters.complete(name, range(200 + i, 200 + i + prompt), generated).status == 200
    routed = 3 * (prompt + generated - 1) * LAYERS  # the last token of an answer is not computed
    now = wait_until(adapters, "hydraserve_router_tokens_total", routed, adapter=name, module="q_proj")
    assert now.value("hydraserve_adapter_requests_total", adapter=name) == 3
    assert now.value("hydraserve_adapter_requests_total", adapter=name, outcome="length") == 3
    assert now.value("hydraserve_adapter_prompt_tokens_total", adapter=name) == 3 * prompt
    assert now.value("hydraserve_adapter_generated_tokens_total", adapter=name) == 3 * generated
    for histogram in ("time_to_first_token", "time_per_output_token", "request_duration"):
        assert now.value(f"hydraserve_adapter_{histogram}_seconds_count", adapter=name) == 3
    first, each, whole = (
        now.value(f"hydraserve_adapter_{histogram}_seconds_sum", adapter=name) / 3
        for histogram in ("time_to_first_token", "time_per_output_token", "request_duration")
    )
    assert 0 < first < whole
    assert first + (generated - 1) * each == pytest.approx(whole, rel=0.25)
    for module in TARGETS:
        assert now.value("hydraserve_router_tokens_total", adapter=name, module=module) == routed
        weights = now.value("hydraserve_router_weight_total", adapter=name, module=module)
        assert weights == pytest.approx(routed, rel=1e-5), "the weights of a token sum to one"
        assert 0 < now.value("hydraserve_router_entropy_total", adapter=name, module=module) < routed
    assert now.labels("hydraserve_router_weight_total", "head", adapter=name) == {"0", "1", "2"}
    assert now.value("hydraserve_adapter_state", adapter=name, state="slot") == 1
    assert now.value("hydraserve_adapter_loads_total", adapter=name, place="slot") == 1
    assert now.value("hydraserve_adapter_loads_total", adapter=name, place="host") == 1
    assert now.value("hydraserve_adapter_load_seconds_count", adapter=name) == 1
    assert now.value("hydraserve_adapter_bytes", adapter=name) > 1e5


def test_heads_are_used_as_the_routing_route_says(adapters: AdapterClient, fresh: list[str]) -> None:
    body = {"model": fresh[1], "prompt": list(range(300, 340)), "max_tokens": 100, "ignore_eos": True}
    answer = adapters.http.post("/v1/routing", json={**body, "format": "npz", "modules": ["o_proj"]})
    with np.load(io.BytesIO(answer.content)) as arrays:
        weights, usage = arrays["weights"][:-1], json.loads(str(arrays["summary"]))["usage"]
    tokens = len(weights) * LAYERS
    now = wait_until(adapters, "hydraserve_router_tokens_total", tokens, adapter=fresh[1], module="o_proj")
    for head, share in enumerate(weights.mean((0, 1))):
        counted = now.value("hydraserve_router_weight_total", adapter=fresh[1], module="o_proj", head=str(head))
        assert counted / tokens == pytest.approx(share, abs=1e-5)
    entropy = now.value("hydraserve_router_entropy_total", adapter=fresh[1], module="o_proj")
    assert entropy / tokens == pytest.approx(usage["entropy"], abs=1e-4)
    collapsed = (weights.mean(0).max(1) > 0.95).mean()  # of this module; the series is about all of them
    assert abs(now.value("hydraserve_router_collapsed_ratio", adapter=fresh[1]) - collapsed) < 0.5


def test_a_client_that_leaves_and_requests_for_the_base_model(adapters: AdapterClient) -> None:
    before = scrape(adapters)
    body = {"model": "mlp-r16-e2", "prompt": [3, 4, 5], "max_tokens": 900, "ignore_eos": True, "stream": True}
    with adapters.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()  # the connection is closed with it
        next(lines)
        wait_for(
            lambda: scrape(adapters).value("hydraserve_adapter_requests_running", adapter="mlp-r16-e2") == 1,
            "the request to be seen running",
        )
    aborts = before.value("hydraserve_adapter_requests_total", adapter="mlp-r16-e2", outcome="abort") + 1
    wait_until(adapters, "hydraserve_adapter_requests_total", aborts, adapter="mlp-r16-e2", outcome="abort")
    wait_until(adapters, "hydraserve_adapter_requests_running", 0, adapter="mlp-r16-e2")
    requests = before.value("hydraserve_adapter_requests_total", adapter="base")
    assert adapters.complete("demo", [3, 4, 5]).status == 200
    wait_until(adapters, "hydraserve_adapter_requests_total", requests + 1, adapter="base")


def settled_look_ups(adapters: AdapterClient) -> tuple[float, float]:
    """Hits and misses of slots, when they have stayed for longer than the server keeps what its engine said."""
    seen: list[tuple[float, tuple[float, float]]] = []

    def stays() -> bool:
        found = scrape(adapters)
        counts = found.value("hydraserve_slot_hits_total"), found.value("hydraserve_slot_misses_total")
        if not seen or seen[-1][1] != counts:
            seen.append((time.monotonic(), counts))
        return time.monotonic() - seen[-1][0] > 2.5

    wait_for(stays, "the slots' counts to stay")
    return seen[-1][1]


def test_an_adapter_hits_its_slot_once_a_request_and_not_once_a_step(adapters: AdapterClient) -> None:
    assert adapters.complete("oracle", [3, 4, 5], 2).status == 200
    hits, misses = settled_look_ups(adapters)
    assert adapters.complete("oracle", [3, 4, 6], 20, cache_salt="anew").status == 200
    assert settled_look_ups(adapters) == (hits + 1, misses)


def test_waiting_for_the_adapter_counts(adapters: AdapterClient) -> None:
    """A derived adapter is made and loaded by its first request; that takes longer than to answer it."""
    name, began = "all-r8-e4@top_k=3", time.monotonic()
    assert adapters.complete(name, [9, 8, 7], 1).status == 200
    seconds = time.monotonic() - began
    now = wait_until(adapters, "hydraserve_adapter_requests_total", 1, adapter=name)
    for histogram in ("time_to_first_token", "request_duration"):
        measured = now.value(f"hydraserve_adapter_{histogram}_seconds_sum", adapter=name)
        assert 0.8 * seconds < measured < seconds, histogram


def test_an_adapter_that_makes_room_for_others(adapters: AdapterClient) -> None:
    start = scrape(adapters)
    slots = int(start.value("hydraserve_slots"))
    names = ["all-r8-e4", "attn-r4-e3", "mlp-r16-e2", "plain-r8", "oracle", "oracle@uniform", "oracle@head=0"]
    assert slots < len(names)
    for name in (*names, names[0]):
        assert adapters.complete(name, [9, 8, 7], 2).status == 200
    misses = start.value("hydraserve_slot_misses_total")
    wait_for(lambda: scrape(adapters).value("hydraserve_slot_misses_total") > misses, "slots to change hands")
    now = scrape(adapters)
    assert now.value("hydraserve_slots_used") == slots
    assert now.value("hydraserve_adapter_evictions_total", place="slot") > 0
    assert now.value("hydraserve_adapter_evictions_total", place="host") > 0
    assert now.value("hydraserve_host_cache_misses_total") > start.value("hydraserve_host_cache_misses_total")
    assert now.value("hydraserve_host_cache_hits_total") > 0
    assert now.value("hydraserve_host_cache_adapters") <= now.value("hydraserve_host_cache_capacity") == slots
    assert now.value("hydraserve_host_cache_bytes") == now.value("hydraserve_adapter_bytes")
    for name in names:
        assert now.labels("hydraserve_adapter_state", "state", adapter=name) == {"slot", "host", "disk"}
        assert now.value("hydraserve_adapter_state", adapter=name) == 1


def test_every_series_is_there(adapters: AdapterClient) -> None:
    assert adapters.complete("oracle", range(400, 420), 110).status == 200
    wait_for(lambda: "hydraserve_router_collapsed_ratio{" in scrape(adapters).text, "enough tokens")
    shown = {sample.name for sample in scrape(adapters).samples()}
    for metric in vars(Metrics(CollectorRegistry())).values():
        family = metric.describe()[0]
        name = family.name + {"counter": "_total", "histogram": "_bucket"}.get(family.type, "")
        assert name in shown, name
    text = " ".join(dashboard_queries(json.loads((DEPLOY / "grafana" / "hydraserve.json").read_text())))
    assert set(re.findall(r"vllm:\w+", text)) <= shown
    accept = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    assert "\nvllm:num_requests_running{" in adapters.http.get("/metrics", headers=accept).text  # as Prometheus asks


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool; Debian: apt-get install prometheus")
def test_promtool_has_nothing_to_say(adapters: AdapterClient) -> None:
    lines = scrape(adapters).text.splitlines(keepends=True)
    ours = "".join(line for line in lines if re.match(r"(# \w+ )?hydraserve_", line))
    families = {line.split()[2] for line in ours.splitlines() if line.startswith("# HELP")}
    created = {name for name in families if name.endswith("_created")}  # prometheus_client's, one for each counter
    assert len(families - created) == len(vars(Metrics(CollectorRegistry())))
    done = subprocess.run(["promtool", "check", "metrics"], input=ours, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    whole = subprocess.run(
        ["promtool", "check", "metrics"], input="".join(lines), capture_output=True, text=True, timeout=60
    )
    assert "hydraserve" not in whole.stdout + whole.stderr


class Prometheus:
    """A real one, with the files of deploy/prometheus but for the address and how often it asks."""

    def __init__(self, server: ServerProcess, folder: Path) -> None:
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s", "scrape_timeout": "1s"}
        config["rule_files"] = [str(DEPLOY / "prometheus" / file) for file in config["rule_files"]]
        config["scrape_configs"][0] |= {"scrape_interval": "3s", "scrape_timeout": "3s"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        self._api = httpx.Client(base_url=f"http://{address}/api/v1")
        files = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        with (folder / "log").open("w") as log:
            command = ["prometheus", *files, f"--web.listen-address={address}"]
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._api.close()

    def query(self, expr: str) -> list[dict[str, Any]]:
        """[{"metric": labels, "value": [time, text]}]; nothing while Prometheus starts."""
        try:
            answer = self._api.get("/query", params={"query": expr}).json()
        except (httpx.TransportError, json.JSONDecodeError):
            return []
        assert answer["status"] == "success", f"{answer} for {expr}"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def shows(self, expr: str) -> bool:
        return bool(self.query(expr))

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._api.get("/rules").json()["data"]["groups"] for rule in group["rules"]]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus; Debian: apt-get install prometheus")
def test_prometheus_scrapes_and_answers(adapters: AdapterClient, server: ServerProcess, tmp_path: Path) -> None:
    with Prometheus(server, tmp_path) as prometheus:
        wait_for(lambda: [s["value"][1] for s in prometheus.query("up")] == ["1"], "a scrape")

        def shares() -> dict[str, float]:
            assert adapters.complete("oracle", [5, 6, 7], 4).status == 200
            found = prometheus.query('adapter_head:hydraserve_router_weight:share_rate5m{adapter="oracle"}')
            return {sample["metric"]["head"]: float(sample["value"][1]) for sample in found}

        wait_for(lambda: len(shares()) == 2, "usage shares of both heads")
        assert sum(shares().values()) == pytest.approx(1, abs=1e-3)
        panels = [*dashboard_queries(json.loads((DEPLOY / "grafana" / "hydraserve.json").read_text()))]
        for expr in panels:  # a scrape that is late leaves a gap of seconds
            wait_for(partial(prometheus.shows, expr), f"something to show for {expr}", limit_s=15)
        wait_for(lambda: all(rule["health"] != "unknown" for rule in prometheus.rules()), "all rules evaluated")
        assert [rule for rule in prometheus.rules() if rule["health"] != "ok"] == []
        firing = [rule["name"] for rule in prometheus.rules() if rule.get("state") == "firing"]
        assert firing == []
