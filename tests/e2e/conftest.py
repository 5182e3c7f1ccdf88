"""Servers that the end-to-end tests share: starting an engine takes about a minute."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from adapter_client import write_adapters
from engines import ENGINE_ENV
from source_servers import FileHandler, serving

from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.bench.process import ServerProcess
from hydraserve.models import base_shapes

ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ALL_MODULES[:4]

# name -> (targets, rank, heads): different ranks, heads and modules, and one plain LoRA
SYNTHETIC = {
    "all-r8-e4": (ALL_MODULES, 8, 4),
    "attn-r4-e3": (ATTENTION, 4, 3),
    "mlp-r16-e2": (ALL_MODULES[4:], 16, 2),
    "plain-r8": (ALL_MODULES, 8, 1),
}

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"


@pytest.fixture(scope="session")
def synthetic_adapters(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random adapters for the demo base, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    shapes = base_shapes(str(demo_model))
    for seed, (name, (targets, rank, heads)) in enumerate(SYNTHETIC.items()):
        save_adapter(make_adapter(shapes, targets, rank, heads, seed=seed), folder / name)
    return {name: folder / name for name in SYNTHETIC}


@pytest.fixture(scope="session")
def server(
    demo_model: Path,
    synthetic_adapters: dict[str, Path],
    oracle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    """One float32 server on the demo base: all synthetic adapters, and the authors' own under the name "oracle".

    Not compiled, which takes a minute and more: test_parallel_e2e compares a compiled model with one that is not.
    """
    adapters = [f"{name}={path}" for name, path in synthetic_adapters.items()]
    adapters.append(f"oracle={oracle / 'adapters' / 'mlp_r2_e2'}")
    arguments = ["--model", str(demo_model), "--served-model-name", "demo", "--dtype", "float32", "--enforce-eager"]
    arguments += [part for adapter in adapters for part in ("--adapter", adapter)]
    arguments += ["--max-model-len", "1024", "--max-num-seqs", "16", "--max-logprobs", "20", "--enable-prefix-caching"]
    arguments += ["--max-rank", "16", "--max-heads", "4"]  # for the adapters that tests load
    arguments += ["--metrics-adapters", "1000"]  # metrics of every adapter, however many the tests load
    arguments += ["--router-metrics", "on", "--allow-source", str(tmp_path_factory.getbasetemp())]
    arguments += ["--allow-source", str(EXAMPLES)]
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(arguments, log, ENGINE_ENV) as process:
        yield process


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)


@pytest.fixture(scope="session")
def tiny_adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Random adapters for the tiny Llama: different in content, rank and number of heads."""
    return write_adapters(tiny_llama, tmp_path_factory.mktemp("tiny-adapters"), 8)


@pytest.fixture(scope="session")
def tiny_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for adapters that tests make and load into `tiny_server`."""
    return tmp_path_factory.mktemp("tiny-made")


@pytest.fixture(scope="session")
def tiny_www(tiny_adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a web server with adapters of `tiny_adapters` as archives: v6.tar."""
    folder = tmp_path_factory.mktemp("www")
    with tarfile.open(folder / "v6.tar", "w") as tar:
        tar.add(tiny_adapters[6], "v6")
    with serving(FileHandler, folder) as (url, _):
        yield url


@pytest.fixture(scope="session")
def unreadable_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder whose file is damaged: what `tiny_server` starts with."""
    folder = tmp_path_factory.mktemp("state")
    (folder / "adapters.sqlite").write_bytes(b"no database, but somebody's file " * 200)
    return folder


@pytest.fixture(scope="session")
def tiny_server(
    tiny_llama: Path,
    tiny_adapters: list[Path],
    tiny_www: str,
    tiny_made: Path,
    unreadable_state: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    """A server for tests that put it under load, feed it nonsense or make its disk fail; it has to survive them all."""
    arguments = ["--model", str(tiny_llama), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", "512", "--max-num-seqs", "8", "--slots", "4", "--max-adapters", "8"]
    arguments += ["--max-rank", "16", "--max-heads", "8", "--max-queued-requests", "100", "--max-body-mib", "1"]
    arguments += ["--max-logprobs", "20"]
    arguments += ["--num-gpu-blocks-override", "64"]  # a pool that is soon used whole: then memory has no cause to grow
    arguments += ["--state-dir", str(unreadable_state), "--allow-source", str(tiny_adapters[0].parent)]
    arguments += ["--allow-source", tiny_www, "--allow-source", str(tiny_made), "--router-metrics", "on"]
    arguments += ["--metrics-adapters", "1000"]  # metrics of every adapter, however many the tests load
    for name, path in zip(("first", "second", "third"), tiny_adapters, strict=False):
        arguments += ["--adapter", f"{name}={path}"]
    folder = tmp_path_factory.mktemp("tiny-server")
    env = {**ENGINE_ENV, "HYDRASERVE_CACHE": str(folder / "cache")}  # downloads are not to be there from earlier runs
    with ServerProcess(arguments, folder / "server.log", env) as process:
        yield process
