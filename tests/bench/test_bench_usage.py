"""Memory and processor time of a session of processes, seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_server
import pytest
from fake_server import serving

from hydraserve.bench.scrape import Scrape, parse, scrape
from hydraserve.bench.usage import (
    Neighbours,
    gpu_memory,
    machine_seconds,
    memory,
    processor_seconds,
    reset_peak,
    session_processes,
)

SIZE = 64 << 20

# Holds SIZE bytes, starts a child that holds as much, uses half a second of processor, says so, and waits.
PROGRAM = f"""
import subprocess, sys, time
block = bytearray(b"x") * {SIZE}
if len(sys.argv) > 1:
    print("child", flush=True)
else:
    child = subprocess.Popen([sys.executable, "-c", sys.stdin.readline().encode().decode("unicode_escape"), "child"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    while time.process_time() < 0.5:
        pass
    print("ready", flush=True)
sys.stdin.readline()
"""


# Holds SIZE bytes, lets them go, says so, and waits.
RELEASES = f"""
import sys
block = bytearray(b"x") * {SIZE}
del block
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def leader() -> Iterator[int]:
    command = [sys.executable, "-c", PROGRAM]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(PROGRAM.encode("unicode_escape").decode() + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        process.kill()


def test_a_session_is_its_leader_and_all_its_children(leader: int) -> None:
    assert len(session_processes(leader)) == 2
    assert os.getpid() not in session_processes(leader)


def test_memory_of_a_session(leader: int) -> None:
    found = memory(leader)
    assert 2 * SIZE < found.pss < 3 * SIZE
    assert 2 * SIZE < found.allocated < found.pss <= found.peak


def test_processor_time_of_a_session(leader: int) -> None:
    assert processor_seconds(leader) >= 0.5


def test_nothing_is_left_of_a_session_that_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], start_new_session=True) as process:
        process.wait()
    assert session_processes(process.pid) == []
    assert memory(process.pid).pss == 0


def test_own_work_is_no_neighbour(leader: int) -> None:
    busy, total = machine_seconds()
    assert 0 < busy <= total
    neighbours = Neighbours(leader)
    before = os.times()
    while os.times().user + os.times().system - before.user - before.system < 0.5:
        pass
    now_busy, now_total = machine_seconds()
    share = neighbours.share()
    # What everybody used, less the half second that was ours (two ticks of rounding).
    expected = max(0.0, (now_busy - busy - 0.5) / (now_total - total))
    assert share == pytest.approx(expected, abs=0.05 + 0.04 / (now_total - total))


def test_a_peak_is_that_of_the_time_since_its_reset() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RELEASES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert memory(process.pid).peak > SIZE
        reset_peak(process.pid)
        assert memory(process.pid).peak < SIZE
        process.kill()


def test_memory_of_a_gpu_is_read_by_process(leader: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = next(pid for pid in session_processes(leader) if pid != leader)
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for listed, expected in (
        (f"{leader}, 500\n{child}, 24\n1, 7000\n", 524 << 20),
        ("1, 7000\n", None),
        (f"{leader}, [N/A]\n", None),
        ("", None),
    ):
        tool.write_text(f"#!/bin/sh\ncat <<END\n{listed}END\n")
        tool.chmod(0o755)
        assert gpu_memory(leader) == expected
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory(leader) is None


METRICS = """\
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0"} 3
vllm:num_preemptions_total{engine="1"} 2
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 7
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",num_gpu_blocks="91",engine="0"} 1
# TYPE hydraserve_adapter_loads_total counter
hydraserve_adapter_loads_total 4
# TYPE python_gc_total counter
python_gc_total 9
"""


def test_a_scrape_reads_the_servers_counters_and_its_cache() -> None:
    found = parse(METRICS)
    assert found.counters == {"vllm:num_preemptions": 5, "hydraserve_adapter_loads": 4}
    assert found.kv_tokens == 91 * 128
    later = parse(METRICS.replace("loads_total 4", "loads_total 6"))
    assert later.since(found) == {"hydraserve_adapter_loads": 2}
    assert parse("").kv_tokens is None


def test_a_page_that_holds_no_metrics_is_no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="html"):
        parse("<!doctype html>\n<html>no such page</html>\n")
    with serving() as fake:
        assert scrape(fake.url).counters
        monkeypatch.setattr(fake_server, "METRICS", "<!doctype html>\n<html>no such page</html>\n")
        assert scrape(fake.url) == Scrape()
