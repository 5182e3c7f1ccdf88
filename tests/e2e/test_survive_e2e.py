"""What clients, disks and clocks do to a server, and how it ends. Each fault with a real process."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from adapter_client import AdapterClient, completion, wait_for
from engines import one_process_engine
from full_disk import full_disk
from raw_client import ask, connect, post_json, read_all
from stream import Stream

from hydraserve.bench.process import ServerProcess
from hydraserve.bench.usage import memory, session_processes

PROMPT = range(5, 45)
AT_ONCE, QUEUED = 8, 100  # of tiny_server
LIBFAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)  # one folder for each architecture


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


def stream(server: ServerProcess, tokens: int) -> Stream:
    """One of the adapter "kept", which has begun."""
    return Stream(server.url, completion("kept", PROMPT, tokens, stream=True))


@pytest.fixture(scope="module")
def state_arguments(tiny_llama: Path, tiny_adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    arguments = ["--model", str(tiny_llama), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", "512", "--max-num-seqs", "8", "--max-rank", "8", "--max-heads", "4"]
    arguments += ["--slots", "4", "--allow-source", str(tiny_adapters[0].parent), "--shutdown-timeout", "20"]
    return [*arguments, "--state-dir", str(tmp_path_factory.mktemp("kept-state"))]


def engine_process(leader: int) -> int:
    """The process that runs the model."""
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in session_processes(leader)}
    return next(pid for pid, name in names.items() if name.startswith("VLLM::EngineCor"))


@dataclass(frozen=True)
class Kept:
    """A server with the run-time adapter "kept". clock: the file that says how wrong its clock is."""

    server: ServerProcess
    clock: Path
    version: str
    tokens: tuple[int, ...]


@pytest.fixture(scope="module")
def kept(
    state_arguments: list[str], tiny_adapters: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kept]:
    """For the next two tests, in their order, because each start takes half a minute."""
    folder = tmp_path_factory.mktemp("kept")
    clock = folder / "clock"
    clock.write_text("+0")
    faked = {"LD_PRELOAD": str(LIBFAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    faked["FAKETIME_DONT_FAKE_MONOTONIC"] = "1"  # as the kernel does when somebody sets the clock
    with one_process_engine(state_arguments, folder / "log", faked if LIBFAKETIME else {}) as server:
        client = AdapterClient(server.url)
        version = client.add("kept", tiny_adapters[0])["version"]
        yield Kept(server, clock, version, client.complete("kept", PROMPT, 12).tokens)


@pytest.mark.long
@pytest.mark.skipif(LIBFAKETIME is None, reason="needs Debian's package libfaketime")
def test_a_clock_that_jumps_changes_nothing(kept: Kept) -> None:
    client = AdapterClient(kept.server.url)
    for days in (400, -400, 0):
        jump = f"{days:+}d"
        running = stream(kept.server, 100)
        kept.clock.write_text(jump)
        answer = client.complete("kept", PROMPT, 12)
        assert (answer.status, answer.tokens) == (200, kept.tokens), jump
        running.join(60)
        assert running.pieces[-1] == "[DONE]", jump
        wrong_by = client.get("kept")["last_used"] - time.time()
        assert wrong_by == pytest.approx(days * 86400, abs=3600), "the server's clock did jump"
    durations = client.metric("hydraserve_adapter_request_duration_seconds_sum")
    assert 0 < durations < 600, "a jump of the clock is no duration"


def test_a_dead_engine_then_a_restart_then_a_drain(kept: Kept, state_arguments: list[str], tmp_path: Path) -> None:
    server = kept.server
    running = stream(server, 460)
    assert server.process is not None
    os.kill(engine_process(server.process.pid), signal.SIGKILL)
    running.join(30)
    assert not running.is_alive(), "a client of a dead engine must not hang"
    assert running.error is not None or "error" in running.pieces[-2] + running.pieces[-1]
    assert '"finish_reason":"length"' not in "".join(running.pieces)
    assert server.process.wait(60) == 1
    assert "error: engine: got a process of it that ended" in server.log.read_text()

    with one_process_engine(state_arguments, tmp_path / "log") as again:
        client = AdapterClient(again.url)
        assert client.get("kept")["version"] == kept.version
        assert client.complete("kept", PROMPT, 12).tokens == kept.tokens
        check_drain(again, client)


def check_drain(server: ServerProcess, client: AdapterClient) -> None:
    """SIGTERM: what runs is finished, new requests are refused, the status is 0."""
    running = stream(server, 460)
    stuck = connect(server.url, receive_buffer=2048)  # a client that never reads does not hold up the end
    stuck.sendall(post_json(completion("tiny", PROMPT, 200, stream=True, logprobs=5)))
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: client.http.get("/ready").status_code == 503, "draining", 5)
    assert client.http.get("/ready").json()["reason"] == "draining"
    assert client.http.get("/health").status_code == 200
    refused = client.http.post("/v1/completions", json=completion("kept", PROMPT, 2))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    running.join(60)
    assert running.pieces[-1] == "[DONE]"
    assert sum('"finish_reason":"length"' in piece for piece in running.pieces) == 1
    started = time.monotonic()
    assert server.process.wait(40) == 0
    assert time.monotonic() - started < 30
    stuck.close()
    leader = server.process.pid
    wait_for(lambda: session_processes(leader) == [], "no process is left behind", 10)
