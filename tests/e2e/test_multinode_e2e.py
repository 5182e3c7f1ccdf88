"""One engine over two nodes, here two network namespaces: the tokens of one process, adapters that come and go on every
rank, and an end when a node fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from adapter_client import AdapterClient, wait_for
from engines import ENGINE_ENV

from hydraserve.bench.process import HYDRASERVE, ServerProcess, free_port
from hydraserve.bench.usage import session_processes

PROMPT, TOKENS = range(5, 25), 16


@dataclass(frozen=True)
class Wire:
    """What lies between the nodes. address: the first node's. first, second: variables of each. enter: words before the
    second one's command."""

    address: str = "127.0.0.1"
    first: Mapping[str, str] = field(default_factory=dict)
    second: Mapping[str, str] = field(default_factory=dict)
    enter: tuple[str, ...] = ()


def ip(*words: str) -> int:
    return subprocess.run(["ip", *words], capture_output=True).returncode


def may_make_namespaces() -> bool:
    """Whether this machine has `ip` and lets us make a network namespace with it."""
    name = f"hydra-try-{os.getpid()}"
    if shutil.which("ip") is None or ip("netns", "add", name) != 0:
        return False
    return ip("netns", "del", name) == 0


CAN_SEPARATE = may_make_namespaces()


@contextmanager
def namespace() -> Iterator[Wire]:
    """A network namespace for the second node, with a wire from this one's: neither sees the other's loopback."""
    name, number = f"hydra-{os.getpid()}", os.getpid() % 250
    near, far = f"hyn{os.getpid()}", f"hyf{os.getpid()}"  # an interface's name has 15 letters at most
    inside = ("-n", name)
    try:
        for words in (
            ("netns", "add", name),
            ("link", "add", near, "type", "veth", "peer", "name", far, "netns", name),
            ("addr", "add", f"10.213.{number}.1/24", "dev", near),
            ("link", "set", near, "up"),
            (*inside, "addr", "add", f"10.213.{number}.2/24", "dev", far),
            (*inside, "link", "set", far, "up"),
            (*inside, "link", "set", "lo", "up"),
        ):
            assert ip(*words) == 0, words
        # Of machines of their own, vLLM and Gloo find the address by the host's name or the default route.
        first = {"VLLM_HOST_IP": f"10.213.{number}.1", "GLOO_SOCKET_IFNAME": near}
        second = {"VLLM_HOST_IP": f"10.213.{number}.2", "GLOO_SOCKET_IFNAME": far}
        yield Wire(f"10.213.{number}.1", first, second, ("ip", "netns", "exec", name))
    finally:
        ip("netns", "del", name)  # and with it the wire


class Nodes:
    """The first node, which answers HTTP, and the second, which computes."""

    def __init__(self, arguments: list[str], wire: Wire, folder: Path) -> None:
        port = free_port()
        together = [*arguments, "--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", wire.address]
        together += ["--master-port", str(port)]
        env = {**ENGINE_ENV, **wire.first, "VLLM_CPU_OMP_THREADS_BIND": "0"}
        self.first = ServerProcess([*together, "--node-rank", "0"], folder / "first.log", env)
        command = [*wire.enter, sys.executable, *HYDRASERVE, *together, "--node-rank", "1", "--headless"]
        self.second_log = folder / "second.log"
        with self.second_log.open("wb") as log:
            self.second = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **ENGINE_ENV, **wire.second, "VLLM_CPU_OMP_THREADS_BIND": "1"},
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


@pytest.fixture(
    params=[
        pytest.param(
            namespace,
            id="namespaces",
            marks=pytest.mark.skipif(not CAN_SEPARATE, reason="needs root and Debian's package iproute2"),
        ),
        pytest.param(
            lambda: nullcontext(Wire()),
            id="loopback",
            marks=pytest.mark.skipif(CAN_SEPARATE, reason="tested between namespaces, which is more"),
        ),
    ]
)
def nodes(
    request: pytest.FixtureRequest, tiny_llama: Path, tiny_adapters: list[Path], tmp_path: Path
) -> Iterator[Nodes]:
    arguments = ["--model", str(tiny_llama), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", "512", "--max-num-seqs", "8", "--max-rank", "8", "--max-heads", "4"]
    arguments += ["--slots", "4", "--max-adapters", "8", "--allow-source", str(tiny_adapters[0].parent)]
    with request.param() as wire:
        nodes = Nodes(arguments, wire, tmp_path)
        try:
            nodes.first.start()
            yield nodes
        finally:
            nodes.stop()


@pytest.mark.long
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
    for key in ("slots", "host_adapters", "host_bytes", "kv_blocks_free"):
        assert after[key] == before[key], key

    os.killpg(nodes.second.pid, signal.SIGKILL)
    assert answered(two, "tiny") != 200, "told, and not left waiting"
    process = nodes.first.process
    assert process is not None
    wait_for(lambda: process.poll() is not None, "the first node ends as well", 60)
    assert process.returncode != 0
