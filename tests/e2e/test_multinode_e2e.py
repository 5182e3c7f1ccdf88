"""One engine over two nodes, here two process groups on the loopback address: the tokens of one process, adapters that
come and go on every rank, and an end when a node fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from adapter_client import AdapterClient, wait_for

from hydraserve.bench.process import HYDRASERVE, ServerProcess, free_port
from hydraserve.bench.usage import session_processes

ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
PROMPT, TOKENS = range(5, 25), 16


class Nodes:
    """The first node, which answers HTTP, and the second, which computes."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        port = free_port()
        together = [*arguments, "--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1"]
        together += ["--master-port", str(port)]
        env = {**ENV, "VLLM_CPU_OMP_THREADS_BIND": "0"}
        self.first = ServerProcess([*together, "--node-rank", "0"], folder / "first.log", env)
        command = [sys.executable, *HYDRASERVE, *together, "--node-rank", "1", "--headless"]
        self.second_log = folder / "second.log"
        with self.second_log.open("wb") as log:
            self.second = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **ENV, "VLLM_CPU_OMP_THREADS_BIND": "1"},
                start_new_session=True,
            )

    def stop(self) -> None:
        if self.first.process is not None:
            self.first.stop()
        for pid in session_processes(self.second.pid):
            os.kill(pid, signal.SIGKILL)
        self.second.wait()


def answered(client: AdapterClient, model: str) -> int:
    """The status of an answer; 0 when the connection is closed without one."""
    try:
        return client.complete(model, PROMPT, TOKENS).status
    except httpx.RemoteProtocolError:
        return 0


@pytest.fixture
def nodes(tiny_llama: Path, tiny_adapters: list[Path], tmp_path: Path) -> Iterator[Nodes]:
    arguments = ["--model", str(tiny_llama), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", "512", "--max-num-seqs", "8", "--max-rank", "8", "--max-heads", "4"]
    arguments += ["--slots", "4", "--max-adapters", "8", "--allow-source", str(tiny_adapters[0].parent)]
    nodes = Nodes(arguments, tmp_path)
    try:
        nodes.first.start()
        yield nodes
    finally:
        nodes.stop()


def test_two_nodes_equal_one_process(nodes: Nodes, tiny_server: ServerProcess, tiny_adapters: list[Path]) -> None:
    one, two = AdapterClient(tiny_server.url), AdapterClient(nodes.first.url)
    before = two.list()["residency"]
    for name, path in zip(("first", "second"), tiny_adapters, strict=False):
        two.add(name, path)
    for model in ("tiny", "first", "second"):
        assert two.complete(model, PROMPT, TOKENS).tokens == one.complete(model, PROMPT, TOKENS).tokens, model
    assert sorted(filter(None, two.list()["residency"]["slots"])) == ["first", "second"]
    for name in ("first", "second"):
        two.remove(name)
    after = two.list()["residency"]
    for field in ("slots", "host_adapters", "host_bytes", "kv_blocks_free"):
        assert after[field] == before[field], field

    os.killpg(nodes.second.pid, signal.SIGKILL)
    assert answered(two, "tiny") != 200, "told, and not left waiting"
    process = nodes.first.process
    assert process is not None
    wait_for(lambda: process.poll() is not None, "the first node ends as well", 60)
    assert process.returncode != 0
