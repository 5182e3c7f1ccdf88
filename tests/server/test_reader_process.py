"""The process that reads adapters: its place among the machine's processes, and what follows when it ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from hydraserve.adapters.ingest import Ingester

AUTOGROUP = Path("/proc/self/autogroup")


def reader_pid(ingester: Ingester) -> int:
    return ingester._reader().submit(os.getpid).result(60)


def test_the_reader_yields_to_what_else_the_machine_runs(ingester: Ingester) -> None:
    pid = reader_pid(ingester)
    assert os.getpriority(os.PRIO_PROCESS, pid) == 10
    assert os.getsid(pid) == pid  # or its niceness would only count against the server's own processes


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="the kernel does not group processes by session")
def test_the_readers_session_yields_to_other_sessions(ingester: Ingester) -> None:
    assert Path(f"/proc/{reader_pid(ingester)}/autogroup").read_text().split()[-2:] == ["nice", "10"]


def test_a_reader_that_ended_between_two_adapters_fails_neither(versions: list[Path], ingester: Ingester) -> None:
    first = reader_pid(ingester)
    expected = ingester.read(versions[0])
    os.kill(first, signal.SIGKILL)
    for _ in range(1000):
        if ingester._pool is None or ingester._pool._broken:  # the pool has noticed
            break
        time.sleep(0.01)
    assert ingester.read(versions[0]) == expected
    assert reader_pid(ingester) != first
