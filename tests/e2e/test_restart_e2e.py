"""How a server ends and what it has afterwards: a dead engine, a restart, a drain; and a clock that jumps before."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from adapter_client import AdapterClient, completion, wait_for
from engines import one_process_engine
from raw_client import connect, post_json
from stream import Stream

from hydraserve.bench.process import ServerProcess
from hydraserve.bench.usage import session_processes

PROMPT = range(5, 45)
LIBFAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)  # one folder for each architecture


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
