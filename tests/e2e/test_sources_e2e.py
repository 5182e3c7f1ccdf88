"""Adapters from everywhere, a directory that is followed, state that survives a restart, the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import safetensors.torch
import torch
from adapter_client import AdapterClient, wait_for, write_adapters
from engines import one_process_engine
from moto.server import ThreadedMotoServer
from source_servers import FileHandler, HubHandler, serving

from hydraserve.adapters.archives import METADATA_CONFIG
from hydraserve.adapters.checkpoint import load_adapter
from hydraserve.adapters.registry import AdapterEntry, Journal, Origin, Registry
from hydraserve.adapters.store import AdapterStore
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.bench.process import ServerProcess
from hydraserve.models import base_shapes

PROMPT = list(range(20, 60))


class Places:
    """Where the adapters are: folders, archives, and servers that have them."""

    def __init__(self, root: Path, base: Path, stack: ExitStack) -> None:
        self.root, self.wish, self.state = root, root / "wish", root / "state"
        self.versions = write_adapters(base, root / "local", 6)
        self.digests = [load_adapter(path).digest for path in self.versions]
        shutil.copytree(self.versions[0], self.wish / "first")
        for revision, version in (("main", 1), ("v2", 2)):
            shutil.copytree(self.versions[version], root / "hub" / "org" / "name" / revision)
        self.hub, self.hub_handler = stack.enter_context(
            serving(HubHandler, root / "hub", commits={"main": "a" * 40, "v2": "b" * 40})
        )
        (root / "www").mkdir()
        with tarfile.open(root / "www" / "sql.tar.gz", "w:gz") as tar:
            tar.add(self.versions[3], "sql")
        shutil.copy(root / "www" / "sql.tar.gz", root / "local")
        self.www, self.www_handler = stack.enter_context(serving(FileHandler, root / "www"))
        tensors = torch.load(self.versions[4] / "adapter_model.bin", weights_only=True)
        config = (self.versions[4] / "adapter_config.json").read_text()
        safetensors.torch.save_file(tensors, root / "www" / "one.safetensors", metadata={METADATA_CONFIG: config})
        s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        s3.start()
        stack.callback(s3.stop)
        host, port = s3.get_host_and_port()
        self.s3 = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        client = boto3.client("s3", endpoint_url=self.s3, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="adapters")
        for file in self.versions[5].iterdir():
            client.upload_file(str(file), "adapters", f"team/sql/{file.name}")

    def server(self, base: Path) -> ServerProcess:
        arguments = ["--model", str(base), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
        arguments += ["--max-model-len", "256", "--max-num-seqs", "8", "--slots", "4", "--max-adapters", "8"]
        arguments += ["--adapter-dir", str(self.wish), "--state-dir", str(self.state)]
        for source in (self.root / "local", "hf://", "s3://adapters", self.www):
            arguments += ["--allow-source", str(source)]
        env = {"HYDRASERVE_CACHE": str(self.root / "cache"), "HF_HUB_OFFLINE": "0"}
        env |= {"HF_ENDPOINT": self.hub, "HF_HOME": str(self.root / "home"), "AWS_ENDPOINT_URL": self.s3}
        env |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
        return one_process_engine(arguments, self.root / "server.log", env)


@pytest.fixture(scope="module")
def places(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    with ExitStack() as stack:
        yield Places(tmp_path_factory.mktemp("places"), tiny_llama, stack)


@pytest.fixture(scope="module")
def server(places: Places, tiny_llama: Path) -> Iterator[ServerProcess]:
    with places.server(tiny_llama) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> AdapterClient:
    return AdapterClient(server.url)


def test_the_directory_is_the_wish(client: AdapterClient, places: Places) -> None:
    card = client.get("first")
    assert (card["state"], card["origin"], card["version"]) == ("unread", "directory", None), "not read at the start"
    assert client.complete("first", PROMPT).digest == places.digests[0]
    assert client.http.delete("/v1/adapters/first").status_code == 409

    growing = places.wish / "second"
    growing.mkdir()
    weights = (places.versions[1] / "adapter_model.bin").read_bytes()
    (growing / "adapter_model.bin").write_bytes(weights[: len(weights) // 2])
    shutil.copy(places.versions[1] / "adapter_config.json", growing)
    wait_for(lambda: "second" in client.names() or "second" in places_log(places), "the half copy was looked at")
    assert client.complete("second", PROMPT).status == 404, "half a copy is never served"
    (growing / "adapter_model.bin").write_bytes(weights)
    wait_for(lambda: "second" in client.names() and client.get("second")["version"] is not None, "it is served")
    assert client.complete("second", PROMPT).digest == places.digests[1]

    shutil.copytree(places.versions[2], places.wish / ".new")
    shutil.rmtree(growing)
    (places.wish / ".new").rename(growing)
    wait_for(lambda: client.complete("second", PROMPT).digest == places.digests[2], "the new content is served")
    shutil.rmtree(growing)
    wait_for(lambda: client.complete("second", PROMPT).status == 404, "it is not served any more")


def places_log(places: Places) -> str:
    return (places.root / "server.log").read_text(errors="replace")


def test_every_source(client: AdapterClient, places: Places) -> None:
    sources: dict[str, tuple[str, int]] = {
        "hub": ("hf://org/name", 1),
        "hub-v2": ("hf://org/name@v2", 2),
        "archive": (f"{places.www}/sql.tar.gz", 3),
        "local-archive": (str(places.root / "local" / "sql.tar.gz"), 3),
        "single": (f"{places.www}/one.safetensors", 4),
        "s3": ("s3://adapters/team/sql", 5),
        "file": (f"file://{places.versions[4]}", 4),
    }
    for name, (source, version) in sources.items():
        card = client.add(name, source)
        assert (card["version"], card["source"]) == (places.digests[version], source)
        assert client.complete(name, PROMPT).digest == places.digests[version]
    for name in sources:
        client.remove(name)
    assert list((places.root / "cache").glob("run/*/fetch-*")) == [], "downloads are cleared away"


def test_sources_that_fail(client: AdapterClient, places: Places) -> None:
    def add(source: str, **fields: Any) -> httpx.Response:
        return client.http.post("/v1/adapters", json={"name": "failing", "source": source, **fields})

    assert add("hf://org/missing").status_code == 404
    assert add("hf://org/name@v9").status_code == 404
    assert add("s3://adapters/nothing").status_code == 404
    assert add("s3://other/sql").status_code == 403
    wrong = add(f"{places.www}/sql.tar.gz", digest="0" * 64)
    assert (wrong.status_code, places.digests[3] in wrong.text) == (409, True)
    (places.root / "www" / "bad.tar").write_bytes(b"\0" * 10_000)
    assert add(f"{places.www}/bad.tar").status_code == 422
    places.www_handler.failures = 1000
    down = add(f"{places.www}/sql.tar.gz?signature=geheim")
    places.www_handler.failures = 0
    assert (down.status_code, "503" in down.text, "geheim" in down.text) == (502, True, False)
    assert "geheim" not in places_log(places)
    assert "failing" not in client.names()


def hydraserve(server: ServerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HYDRASERVE_URL": server.url, "COLUMNS": "200"}
    command = [sys.executable, "-m", "hydraserve.cli.main", "adapters", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_the_command_line(server: ServerProcess, client: AdapterClient, places: Places) -> None:
    loaded = hydraserve(server, "load", "by-hand", os.path.relpath(places.versions[1]))
    assert loaded.returncode == 0, loaded.stderr
    assert places.digests[1][:12] in loaded.stdout
    assert hydraserve(server, "pin", "by-hand").returncode == 0
    listed = hydraserve(server, "list").stdout
    (row,) = [line for line in listed.splitlines() if "by-hand" in line and "slots:" not in line]
    assert all(text in row for text in ("slot", "yes", "hydralora", places.digests[1][:12]))
    assert client.complete("by-hand", PROMPT).digest == places.digests[1]
    assert hydraserve(server, "replace", "by-hand", str(places.versions[2])).returncode == 0
    assert json.loads(hydraserve(server, "show", "by-hand").stdout)["version"] == places.digests[2]
    assert hydraserve(server, "unpin", "by-hand").returncode == 0
    assert hydraserve(server, "prefetch", "by-hand").returncode == 0
    taken = hydraserve(server, "load", "by-hand", str(places.versions[3]))
    assert (taken.returncode, "another name" in taken.stderr, "Traceback" in taken.stderr) == (1, True, False)
    assert hydraserve(server, "unload", "by-hand").returncode == 0
    again = hydraserve(server, "unload", "by-hand")
    assert (again.returncode, "by-hand" in again.stderr, "Traceback" in again.stderr) == (1, True, False)


def remember_of_another_base(state: Path, base: Path, name: str) -> None:
    """As if the server had served this adapter, of modules twice as large, over another base model."""
    shapes = {module: (2 * inputs, 2 * outputs) for module, (inputs, outputs) in base_shapes(str(base)).items()}
    stored = AdapterStore(state / "store").add(make_adapter(shapes, ("q_proj", "down_proj"), 4, 3, seed=9))
    journal = Journal(state)
    Registry(journal).put(AdapterEntry(name, "/gone", Origin.API, version=stored))
    journal.close()


@pytest.mark.long
def test_what_was_loaded_survives_a_restart(
    server: ServerProcess, client: AdapterClient, places: Places, tiny_llama: Path
) -> None:
    """The last test: it ends the server that the others use."""
    client.add("kept", "s3://adapters/team/sql", pin=True)
    copied = places.root / "local" / "short-lived"
    shutil.copytree(places.versions[3], copied)
    client.add("source-gone", copied)
    client.add("removed", places.versions[4])
    client.remove("removed")
    expected = {name: client.complete(name, PROMPT, 8) for name in ("kept", "source-gone", "first")}
    server.stop()
    shutil.rmtree(copied)
    remember_of_another_base(places.state, tiny_llama, "misfit")
    with places.server(tiny_llama) as again:
        after = AdapterClient(again.url)
        assert sorted(after.names()) == ["first", "kept", "misfit", "source-gone"]
        refused = after.complete("misfit", PROMPT, 8)
        assert (refused.status, refused.body["error"]["reason"]) == (422, "BaseShapeError"), refused.body
        assert (after.get("kept")["pinned"], after.get("kept")["state"]) == (True, "slot")
        for name, before in expected.items():
            answer = after.complete(name, PROMPT, 8)
            assert (answer.version, answer.tokens) == (before.version, before.tokens)
