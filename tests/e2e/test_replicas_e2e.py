"""Two replicas: what gateways read of them and how they end; behind nginx, routed by model, each keeps its share of the
adapters in its slots."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from adapter_client import AdapterClient, completion, wait_for, write_adapters
from engines import one_process_engine
from prometheus_client.parser import text_string_to_metric_families
from stream import Stream

from hydraserve.bench.process import ServerProcess, free_port
from hydraserve.bench.scrape import scrape
from hydraserve.bench.usage import session_processes

NGINX = Path(__file__).resolve().parents[2] / "deploy" / "nginx"
MODULE = Path("/usr/lib/nginx/modules/ngx_http_js_module.so")
ADAPTERS, SLOTS, REQUESTS = 12, 4, 150
PROMPT = (5, 6, 7)

# Also for what does not go through nginx: two servers take minutes to start beside other tests.
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("nginx") is None or not MODULE.exists(),
        reason="needs Debian's packages nginx-light and libnginx-mod-http-js",
    ),
]


@pytest.fixture(scope="module")
def names() -> list[str]:
    return [f"tenant-{i}" for i in range(ADAPTERS)]


@pytest.fixture(scope="module")
def replicas(
    tiny_llama: Path, names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[ServerProcess]]:
    """Two servers with the same adapters, more than either has slots for. Each computes with one thread."""
    folder = tmp_path_factory.mktemp("replicas")
    paths = write_adapters(tiny_llama, folder, ADAPTERS)
    arguments = ["--model", str(tiny_llama), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--hf-overrides", '{"max_position_embeddings": 16384}', "--max-model-len", "16384"]
    arguments += ["--max-num-seqs", "8"]
    arguments += ["--slots", str(SLOTS), "--max-adapters", str(ADAPTERS)]
    arguments += [part for name, path in zip(names, paths, strict=True) for part in ("--adapter", f"{name}={path}")]
    servers = [one_process_engine(arguments, folder / f"log-{i}") for i in range(2)]
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda server: server.start(), servers))
        yield servers
    finally:
        for server in servers:
            if server.process is not None:
                server.stop()


@contextlib.contextmanager
def proxy(folder: Path, replicas: list[ServerProcess], by_model: bool) -> Iterator[str]:
    """nginx as in deploy/nginx, in front of these replicas; without `by_model` it takes them in turn."""
    shutil.copytree(NGINX, folder)
    port = free_port()
    (folder / "listen.conf").write_text(f"listen 127.0.0.1:{port};")
    upstream = (folder / "upstream.conf").read_text()
    for place, replica in zip(("127.0.0.1:8001", "127.0.0.1:8002"), replicas, strict=True):
        assert place in upstream
        upstream = upstream.replace(place, f"127.0.0.1:{replica.port}")
    if not by_model:
        upstream = upstream.replace("hash $model consistent;", "")
    (folder / "upstream.conf").write_text(upstream)
    command = ["nginx", "-p", str(folder), "-c", "nginx.conf", "-e", "error.log", "-g", "daemon off; user root;"]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (folder / "output").read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health").status_code == 200
        return False

    try:
        wait_for(answers, "nginx answers")
        yield url
    finally:
        process.terminate()
        process.wait(10)


def hit_rate(url: str, replicas: list[ServerProcess], names: list[str]) -> float:
    """Share of requests, one step each, whose adapter was in a slot of the replica that they came to."""
    before = [scrape(replica.url) for replica in replicas]
    rng = random.Random(0)
    with AdapterClient(url).http as http:
        for _ in range(REQUESTS):
            answer = http.post("/v1/completions", json=completion(rng.choice(names), PROMPT, 1))
            assert answer.status_code == 200, answer.text
    moved = [scrape(replica.url).since(old) for replica, old in zip(replicas, before, strict=True)]
    misses = sum(m.get("hydraserve_slot_misses", 0) for m in moved)
    assert misses > 0, "there are more adapters than slots"
    return 1 - misses / REQUESTS


def test_affinity_keeps_adapters_in_their_slots(
    replicas: list[ServerProcess], names: list[str], tmp_path: Path
) -> None:
    with proxy(tmp_path / "in-turn", replicas, by_model=False) as url:
        in_turn = hit_rate(url, replicas, names)
    with proxy(tmp_path / "by-model", replicas, by_model=True) as url:
        hit_rate(url, replicas, names)  # each adapter finds its replica
        by_model = hit_rate(url, replicas, names)
    # In turn, every replica sees all adapters: a third of them is in its slots. By model it sees about half.
    assert in_turn == pytest.approx(SLOTS / ADAPTERS, abs=0.15)
    assert by_model > in_turn + 0.15


def test_streams_pass_the_proxy_piece_by_piece(replicas: list[ServerProcess], names: list[str], tmp_path: Path) -> None:
    with proxy(tmp_path / "nginx", replicas, by_model=True) as url:
        body, begun = completion(names[0], PROMPT, 2000, stream=True), time.monotonic()
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            first = time.monotonic()
            assert [line for line in lines if line][-1] == "data: [DONE]"
            assert time.monotonic() - first > first - begun, "most of the time passes after the first piece"


def lora_requests_info(replica: ServerProcess) -> dict[str, str]:
    families = text_string_to_metric_families(httpx.get(f"{replica.url}/metrics", timeout=30).text)
    (sample,) = [s for f in families for s in f.samples if s.name == "vllm:lora_requests_info"]
    return dict(sample.labels)


def test_what_gateways_read(replicas: list[ServerProcess], names: list[str]) -> None:
    replica = replicas[0]
    nobody = {"max_lora": str(SLOTS), "running_lora_adapters": "", "waiting_lora_adapters": ""}
    wait_for(lambda: lora_requests_info(replica) == nobody, "idle")
    models = httpx.get(f"{replica.url}/v1/models").json()["data"]
    assert {m["id"] for m in models if m["parent"] == "tiny"} == set(names)

    # One more adapter than slots: it waits, and is told to wait under its own name. A scrape on busy cores may take
    # longer than that, so the last one that saw it counts, of several attempts.
    asked = names[: SLOTS + 1]
    full: dict[str, str] = {}
    for _ in range(5):
        streams = [Stream(replica.url, completion(name, PROMPT, 1000, stream=True), wait=False) for name in asked]
        while any(stream.is_alive() for stream in streams):
            info = lora_requests_info(replica)
            full = info if info["waiting_lora_adapters"] in asked else full
        if full:
            break
    assert full, "none was seen to wait"
    running = full["running_lora_adapters"].split(",")
    assert set(running) <= set(asked)
    assert len(running) >= SLOTS - 1
    wait_for(lambda: lora_requests_info(replica) == nobody, "idle again")


def test_a_replica_that_ends_gives_its_adapters_to_the_other(
    replicas: list[ServerProcess], names: list[str], tmp_path: Path
) -> None:
    with proxy(tmp_path / "nginx", replicas, by_model=True) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert replicas[1].stop() == 0
        for name in names:
            assert http.post("/v1/completions", json=completion(name, PROMPT, 1)).status_code == 200, name


def test_a_second_signal_ends_a_replica_at_once(replicas: list[ServerProcess], names: list[str]) -> None:
    replica = replicas[0]
    assert replica.process is not None
    leader = replica.process.pid
    body = completion(names[0], PROMPT, 16000, stream=True)
    with httpx.stream("POST", f"{replica.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        deadline = time.monotonic() + 20
        while replica.process.poll() is None and time.monotonic() < deadline:  # the second that arrives counts
            replica.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        assert replica.process.poll() == 128 + signal.SIGTERM
        with contextlib.suppress(httpx.RemoteProtocolError):  # cut, and not ended
            assert "data: [DONE]" not in list(lines)
    wait_for(lambda: session_processes(leader) == [], "no process is left behind")
