"""Two API server processes in front of one engine: which one answers makes no difference."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from adapter_client import AdapterClient, Answer, answer_of, completion, wait_for
from engines import one_process_engine
from stream import Stream

from hydraserve.bench.process import ServerProcess
from hydraserve.bench.usage import session_processes

PROMPT = range(5, 45)
LAYERS = 2
LONGEST = 16384
CONNECTIONS = 12


@pytest.fixture(scope="module")
def server(
    tiny_llama: Path, tiny_adapters: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    arguments = ["--model", str(tiny_llama), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--hf-overrides", json.dumps({"max_position_embeddings": LONGEST}), "--max-model-len", str(LONGEST)]
    arguments += ["--max-num-seqs", "16", "--slots", "2", "--max-adapters", "4"]
    arguments += ["--max-rank", "8", "--max-heads", "4", "--router-metrics", "on", "--no-enable-prefix-caching"]
    arguments += ["--api-server-count", "2", "--allow-source", str(tiny_adapters[0].parent)]
    arguments += ["--adapter", f"first={tiny_adapters[0]}"]
    with one_process_engine(arguments, tmp_path_factory.mktemp("two-processes") / "server.log") as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[AdapterClient]:
    client = AdapterClient(server.url)
    yield client
    client.http.close()


def of_both(server: ServerProcess, call: Callable[[httpx.Client], httpx.Response]) -> list[httpx.Response]:
    """The answers over connections that are open at the same time, so that each process has some of them."""
    clients = [httpx.Client(base_url=server.url, timeout=60) for _ in range(CONNECTIONS)]
    try:
        for client in clients:
            client.get("/health").raise_for_status()
        return [call(client) for client in clients]
    finally:
        for client in clients:
            client.close()


def complete(server: ServerProcess, model: str, tokens: int = 8) -> list[Answer]:
    body = completion(model, PROMPT, tokens)
    return [answer_of(a) for a in of_both(server, lambda client: client.post("/v1/completions", json=body))]


def processes(server: ServerProcess) -> list[int]:
    assert server.process is not None
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in session_processes(server.process.pid)}
    return sorted(pid for pid, name in names.items() if name.startswith("VLLM::APIServer"))


def connections(server: ServerProcess) -> Counter[int]:
    """Established connections of each process to the server's port."""
    port = f":{server.port:04X} "
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if port in line]
    inodes = {row[9] for row in rows if row[3] == "01" and row[1].endswith(port.strip())}
    found: Counter[int] = Counter()
    for pid in processes(server):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            if os.path.islink(fd) and os.readlink(fd)[8:-1] in inodes:
                found[pid] += 1
    return found


def test_both_processes_answer_alike(server: ServerProcess) -> None:
    def shares(http: httpx.Client) -> httpx.Response:
        return httpx.Response(http.get("/ready").status_code, json=connections(server))

    answer = of_both(server, shares)[0]
    assert answer.status_code == 200
    assert len(answer.json()) == 2
    assert min(answer.json().values()) >= 2, "each has some of the connections"
    for model in ("tiny", "first"):
        answers = complete(server, model)
        assert {a.status for a in answers} == {200}
        assert len({a.tokens for a in answers}) == 1
    assert answers[0].version.startswith("first@")
    listed = of_both(server, lambda http: http.get("/v1/models"))
    assert {tuple(m["id"] for m in a.json()["data"]) for a in listed} == {("tiny", "first")}


def test_adapters_come_and_go_for_all(server: ServerProcess, client: AdapterClient, tiny_adapters: list[Path]) -> None:
    assert {a.status for a in complete(server, "late")} == {404}
    client.add("late", tiny_adapters[1])
    before = complete(server, "late")
    assert len({(a.status, a.tokens, a.version) for a in before}) == 1
    client.replace("late", tiny_adapters[3])
    after = complete(server, "late")
    assert len({(a.status, a.tokens, a.version) for a in after}) == 1
    assert (after[0].status, after[0].version != before[0].version) == (200, True)
    derived = complete(server, "first@top_k=1")
    assert len({(a.status, a.tokens, a.version) for a in derived}) == 1
    assert derived[0].status == 200
    client.remove("late")
    assert {a.status for a in complete(server, "late")} == {404}
    assert client.list()["residency"]["kv_blocks_free"] == client.list()["residency"]["kv_blocks"] - 1


def test_more_adapters_than_slots_take_turns(
    server: ServerProcess, client: AdapterClient, tiny_adapters: list[Path]
) -> None:
    names = [f"turn-{i}" for i in range(4)]
    for name, path in zip(names, tiny_adapters, strict=False):
        client.add(name, path)
    streams = [Stream(server.url, completion(names[i % 4], PROMPT, 60, stream=True), wait=False) for i in range(24)]
    for stream in streams:
        stream.join(60)
        assert stream.pieces[-1] == "[DONE]"
    for name in names:
        client.remove(name)


def test_metrics_are_those_of_all(server: ServerProcess, client: AdapterClient) -> None:
    series = {"adapter": "first", "module": "q_proj"}
    requests = client.metric("hydraserve_adapter_requests_total", adapter="first")
    routed = client.metric("hydraserve_router_tokens_total", **series)
    complete(server, "first", tokens=8)
    tokens = CONNECTIONS * (len(PROMPT) + 8 - 1)
    wait_for(
        lambda: client.metric("hydraserve_router_tokens_total", **series) == routed + LAYERS * tokens,
        "the counts",
        10,
    )
    assert client.metric("hydraserve_adapter_requests_total", adapter="first") == requests + CONNECTIONS
    weights = client.metric("hydraserve_router_weight_total", **series)
    assert weights == pytest.approx(client.metric("hydraserve_router_tokens_total", **series), rel=1e-4)
    shown = [a.text for a in of_both(server, lambda http: http.get("/metrics"))]
    assert all("\nvllm:lora_requests_info{" in text for text in shown)

    streams = [Stream(server.url, completion("first", PROMPT, 2000, stream=True), wait=False) for _ in range(6)]
    running = "hydraserve_adapter_requests_running"
    wait_for(lambda: client.metric(running, adapter="first") > 2, "requests run")
    for stream in streams:
        stream.join(60)
    wait_for(lambda: client.metric(running, adapter="first") == 0, "they ended", 10)
    assert client.metric("hydraserve_adapter_requests_waiting") == 0


def test_a_trace_through_either_process(server: ServerProcess) -> None:
    body = {"model": "first", "prompt": list(PROMPT), "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    answers = of_both(server, lambda http: http.post("/v1/routing", json=body))
    assert {a.status_code for a in answers} == {200}
    assert len({str(a.json()["tokens"]) for a in answers}) == 1


def test_a_forced_removal_ends_requests_of_both(
    server: ServerProcess, client: AdapterClient, tiny_adapters: list[Path]
) -> None:
    client.add("doomed", tiny_adapters[2])
    body = completion("doomed", PROMPT, 16000, stream=True)
    streams = [Stream(server.url, body, wait=False) for _ in range(6)]
    assert all(stream.running.wait(30) for stream in streams)
    client.remove("doomed", force=True)
    for stream in streams:
        stream.join(30)
        assert not stream.is_alive()
        assert stream.error is None
    assert all('"finish_reason":"abort"' in "".join(stream.pieces) for stream in streams)
    assert {a.status for a in complete(server, "doomed")} == {404}


def test_the_end(server: ServerProcess) -> None:
    """The last: SIGTERM lets requests of both processes finish. No process stays."""
    streams = [Stream(server.url, completion("first", PROMPT, 300, stream=True)) for _ in range(6)]
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    for stream in streams:
        stream.join(60)
        assert stream.pieces[-1] == "[DONE]"
        assert sum('"finish_reason":"length"' in piece for piece in stream.pieces) == 1
    assert server.process.wait(40) == 0
    leader = server.process.pid
    wait_for(lambda: session_processes(leader) == [], "no process is left behind", 10)
