"""What clients and disks do to a server: each fault with a real process. How one ends: test_restart_e2e."""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_client import AdapterClient, completion, wait_for
from full_disk import full_disk
from raw_client import ask, connect, post_json, read_all

from hydraserve.bench.process import ServerProcess
from hydraserve.bench.usage import memory, session_processes

PROMPT = range(5, 45)
AT_ONCE, QUEUED = 8, 100  # of tiny_server


@pytest.fixture
def client(tiny_server: ServerProcess) -> Iterator[AdapterClient]:
    client = AdapterClient(tiny_server.url)
    yield client
    client.http.close()
    assert tiny_server.process is not None
    assert tiny_server.process.poll() is None


def is_idle(client: AdapterClient) -> bool:
    return client.metric("vllm:num_requests_running") + client.metric("vllm:num_requests_waiting") == 0


def test_an_unreadable_state_is_kept_and_the_server_starts(tiny_server: ServerProcess, unreadable_state: Path) -> None:
    (kept,) = unreadable_state.glob("adapters.sqlite.unreadable-*")
    assert kept.read_bytes() == b"no database, but somebody's file " * 200
    assert str(kept) in tiny_server.log.read_text()


def test_a_server_in_service_is_healthy_and_ready(client: AdapterClient) -> None:
    assert client.http.get("/health").status_code == 200
    answer = client.http.get("/ready")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_what_it_took(
    tiny_server: ServerProcess, client: AdapterClient, stream: bool
) -> None:
    client.complete("first", PROMPT, 2)
    before = client.list()["residency"]["kv_blocks_free"]
    ended = client.metric("hydraserve_adapter_requests_total", adapter="first")
    aborted = client.metric("hydraserve_adapter_requests_total", adapter="first", outcome="abort")
    connection = connect(tiny_server.url)
    connection.sendall(post_json(completion("first", PROMPT, 460, stream=stream, n=AT_ONCE, temperature=1)))
    wait_for(lambda: client.get("first")["requests_running"] > 0, "the request runs")
    connection.close()
    wait_for(lambda: client.metric("hydraserve_adapter_requests_total", adapter="first") > ended, "it ended")
    assert client.metric("hydraserve_adapter_requests_total", adapter="first", outcome="abort") > aborted
    assert client.list()["residency"]["kv_blocks_free"] == before


def test_slow_readers_hold_up_nobody_and_miss_nothing(tiny_server: ServerProcess, client: AdapterClient) -> None:
    tokens = 200
    body = completion("first", PROMPT, tokens, stream=True, n=2, temperature=1, logprobs=5)
    connections = [connect(tiny_server.url, receive_buffer=2048) for _ in range(AT_ONCE)]
    for connection in connections:
        connection.sendall(post_json(body, headers="Connection: close\r\n"))
    assert client.complete("second", PROMPT, 8).status == 200
    wait_for(lambda: is_idle(client), "the engine finishes although nobody reads", 60)
    for connection in connections:
        answer = read_all(connection)
        assert answer.count(b'"finish_reason":"length"') == 2
        assert b"data: [DONE]" in answer
        connection.close()


def test_half_requests_take_no_place(tiny_server: ServerProcess, client: AdapterClient) -> None:
    whole = post_json(completion("first", PROMPT, 2))
    pieces = [b"", b"POST /v1/comp", whole[: whole.index(b"\r\n\r\n")], whole[: whole.index(b"\r\n\r\n") + 30]]
    half_open = [connect(tiny_server.url) for _ in range(4 * (AT_ONCE + QUEUED))]
    for i, connection in enumerate(half_open):
        connection.sendall(pieces[i % len(pieces)])
    assert client.complete("first", PROMPT, 2).status == 200
    assert client.metric("vllm:num_requests_running") == 0
    for connection in half_open:
        connection.close()


def test_ten_thousand_requests_at_once_are_answered_or_refused(
    tiny_server: ServerProcess, client: AdapterClient
) -> None:
    count = 10_000
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count + 500:
        pytest.skip(f"this process may open {hard} files, {count} connections need more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert tiny_server.process is not None
    before = memory(tiny_server.process.pid).allocated

    async def flood() -> list[tuple[int, str]]:
        start = asyncio.Event()
        requests = [post_json(completion(("first", "second", "tiny")[i % 3], PROMPT, 4)) for i in range(3)]
        asks = [asyncio.create_task(ask(tiny_server.url, requests[i % 3], start)) for i in range(count)]
        start.set()
        return [(answer.status, answer.headers.get("retry-after", "")) for answer in await asyncio.gather(*asks)]

    answers = asyncio.run(flood())
    statuses = Counter(status for status, _ in answers)
    assert set(statuses) == {200, 503}
    assert statuses[200] >= AT_ONCE + QUEUED
    assert all(1 <= int(wait) <= 60 for status, wait in answers if status == 503)
    grown = memory(tiny_server.process.pid).allocated - before
    assert grown < 256 << 20, f"{grown / 2**20:.0f} MiB more"
    wait_for(lambda: is_idle(client), "everything is answered")
    assert client.http.get("/ready").status_code == 200
    assert client.complete("first", PROMPT, 4).status == 200


@pytest.mark.parametrize("place", ["a folder", "a download"])
def test_a_full_disk_fails_one_load_and_nothing_else(
    tiny_server: ServerProcess, client: AdapterClient, tiny_adapters: list[Path], tiny_www: str, place: str
) -> None:
    assert tiny_server.process is not None
    source = str(tiny_adapters[5]) if place == "a folder" else f"{tiny_www}/v6.tar"
    expected = client.complete("first", PROMPT, 8).tokens
    with full_disk(20_000, session_processes(tiny_server.process.pid)):
        answer = client.http.post("/v1/adapters", json={"name": "late", "source": source})
        assert answer.status_code == 507, answer.text
        assert "make room" in answer.json()["error"]["message"]
        assert client.complete("first", PROMPT, 8).tokens == expected
        assert client.http.get("/ready").status_code == 200
    assert client.http.get("/v1/adapters/late").status_code == 404
    client.add("late", source)
    assert client.complete("late", PROMPT, 8).status == 200
    client.remove("late")
