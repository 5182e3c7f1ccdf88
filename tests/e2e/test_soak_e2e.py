"""The soak of benchmarks/soak.py in short: the same traffic for a quarter of a minute."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from hydraserve.bench.process import ServerProcess

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from soak import report, soak

SECONDS, ROUND_S = 15.0, 5.0


def test_mixed_traffic_with_adapters_that_come_and_go(tiny_server: ServerProcess, tiny_adapters: list[Path]) -> None:
    assert tiny_server.process is not None
    found = asyncio.run(soak(tiny_server.url, tiny_server.process.pid, tiny_adapters, SECONDS, 6, ROUND_S))
    told = report(found, SECONDS)
    assert told["wrong"] == 0, told
    assert told["server_errors"] == 0
    assert told["compared"] > 50
    assert told["changes"] > 20
    assert told["given_up"] > 0
    # A fresh server's heaps still fill, by 60 MiB in these seconds; slow leaks are for the 30 minutes of the benchmark.
    first, *_, last = told["memory_at_rest_mib"]
    assert last - first < 128, told
