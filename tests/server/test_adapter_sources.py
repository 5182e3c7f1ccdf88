"""Adapters from the Hub, S3 and HTTP: real servers of those protocols, real clients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from full_disk import full_disk
from moto.server import ThreadedMotoServer
from source_servers import FileHandler, HubHandler, serving

from hydraserve.adapters.checkpoint import load_adapter
from hydraserve.adapters.limits import AdapterLimits
from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.sources import DownloadCache, Progress, SourcePolicy, fetch, without_secrets
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    HydraServeError,
    LimitError,
    SourceError,
    SourceForbiddenError,
    StorageError,
)

SHAPES = {f"model.layers.{i}.self_attn.q_proj": (256, 256) for i in range(4)}
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's folder, of about 50 KiB."""
    folder = tmp_path_factory.mktemp("sources") / "sql"
    save_adapter(make_adapter(SHAPES, ("q_proj",), 4, 3, seed=1), folder)
    return folder


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydraserve.adapters.sources.remote._FIRST_PAUSE_S", 0.01)


Fetch = Callable[..., Path]


@pytest.fixture
def get(tmp_path: Path) -> Fetch:
    """fetch(source, limits=...), each time into a new folder. `get.progress` is the last one's."""

    def get(source: str, allowed: str = "", limits: AdapterLimits | None = None, cached: bool = False) -> Path:
        policy = SourcePolicy.of([allowed or source.partition("://")[0] + "://"], limits or AdapterLimits())
        scratch = tmp_path / f"scratch-{len(list(tmp_path.iterdir()))}"
        scratch.mkdir()
        get.progress = Progress()  # type: ignore[attr-defined]
        cache = DownloadCache(tmp_path / "cache") if cached else DownloadCache(scratch / "cache")
        return fetch(source, policy, scratch, get.progress, cache)  # type: ignore[attr-defined]

    return get


@pytest.fixture
def http(adapter: Path) -> Iterator[tuple[str, Any]]:
    with serving(FileHandler, adapter.parent) as server:
        yield server


def same(folder: Path, adapter: Path) -> bool:
    return load_adapter(folder).digest == load_adapter(adapter).digest


def test_a_folder_over_http_is_fetched_with_progress(http: tuple[str, Any], adapter: Path, get: Any) -> None:
    assert same(get(f"{http[0]}/sql"), adapter)
    size = sum(file.stat().st_size for file in adapter.iterdir())
    assert (get.progress.done, get.progress.total) == (size, size)


def test_a_folder_with_safetensors_is_no_archive(tmp_path: Path, get: Any) -> None:
    plain = tmp_path / "www" / "plain"
    save_adapter(make_adapter(SHAPES, ("q_proj",), 4, 1, seed=1), plain)
    assert (plain / "adapter_model.safetensors").is_file()
    with serving(FileHandler, plain.parent) as (url, _):
        assert same(get(f"{url}/plain"), plain)


def test_what_was_fetched_before_is_not_fetched_again_until_it_changes(adapter: Path, tmp_path: Path, get: Any) -> None:
    root = tmp_path / "www"
    save_adapter(load_adapter(adapter), root / "sql")
    with serving(FileHandler, root) as (url, handler):
        first = get(f"{url}/sql", cached=True)
        fetched = handler.requests.count("GET /sql/adapter_model.bin")
        assert same(get(f"{url}/sql", cached=True), first)
        assert handler.requests.count("GET /sql/adapter_model.bin") == fetched > 0
        save_adapter(make_adapter(SHAPES, ("q_proj",), 4, 3, seed=2), root / "new")
        for file in (root / "new").iterdir():
            os.replace(file, root / "sql" / file.name)
        assert not same(get(f"{url}/sql", cached=True), first)


@pytest.mark.parametrize("fault", [{"failures": 2}, {"drops": 1}])
def test_a_server_that_fails_now_and_then_is_asked_again(adapter: Path, get: Any, fault: dict[str, int]) -> None:
    with serving(FileHandler, adapter.parent, **fault) as (url, _):
        assert same(get(f"{url}/sql"), adapter)


def test_a_server_that_always_fails_is_an_error_that_says_so(adapter: Path, get: Any) -> None:
    with serving(FileHandler, adapter.parent, failures=1000) as (url, handler):
        with pytest.raises(SourceError, match="503"):
            get(f"{url}/sql")
        assert 3 <= len(handler.requests) <= 40
    with pytest.raises(SourceError, match="Cannot connect"):
        get(f"{url}/sql")


def test_too_large_a_file_is_refused_before_it_is_read_or_while(adapter: Path, get: Any) -> None:
    limits = replace(AdapterLimits(), file_bytes=10_000)
    for sizes in (True, False):
        with serving(FileHandler, adapter.parent, sizes=sizes) as (url, _):
            with pytest.raises(LimitError, match="at most 10,000 bytes"):
                get(f"{url}/sql", limits=limits)
            if not sizes:
                assert same(get(f"{url}/sql"), adapter), "without sizes it is read to its end"


def test_a_full_disk_is_not_the_sources_fault(http: tuple[str, Any], get: Any) -> None:
    with full_disk(10_000), pytest.raises(StorageError, match="make room"):
        get(f"{http[0]}/sql")


def test_a_download_that_is_not_wanted_any_more_ends(http: tuple[str, Any], tmp_path: Path) -> None:
    policy, cache = SourcePolicy.of(["http://"]), DownloadCache(tmp_path / "cache")
    with pytest.raises(AdapterConflictError, match="removal"):
        fetch(f"{http[0]}/sql", policy, tmp_path, Progress(stopped=True), cache)
    assert list((tmp_path / "download").iterdir()) == []


def test_a_download_that_another_process_takes_away_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "download"
    folder.mkdir()
    (folder / "file").write_bytes(b"x" * 100)
    cache = DownloadCache(tmp_path / "cache", largest=150)
    cache.put("first", folder)
    look = DownloadCache._folders
    monkeypatch.setattr(DownloadCache, "_folders", lambda self: [*look(self), tmp_path / "cache" / "gone"])
    cache.put("second", folder)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["second"]


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("https://u:p@host/x?y=1", "https://host/x"),
        ("https://u:p@ss@host/x@y", "https://host/x@y"),
        ("hf://org/name@revision", "hf://org/name@revision"),
        ("https://host?u@x", "https://host"),
        ("/a?b@c", "/a?b@c"),
    ],
)
def test_what_is_shown_of_a_source(source: str, shown: str) -> None:
    assert without_secrets(source) == shown


def test_nothing_there(http: tuple[str, Any], get: Any) -> None:
    with pytest.raises(AdapterNotFoundError, match="nothing that is known"):
        get(f"{http[0]}/missing")
    with pytest.raises(AdapterNotFoundError, match="no such file"):
        get(f"{http[0]}/missing.tar")


def test_errors_do_not_show_what_may_be_a_secret(adapter: Path, get: Any) -> None:
    with serving(FileHandler, adapter.parent, failures=1000) as (url, _):
        source = url.replace("://", "://user:geheim@") + "/sql?signature=geheim"
        with pytest.raises(HydraServeError) as caught:
            get(source)
        assert "geheim" not in str(caught.value)
        assert "/sql" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("http://other.example/sql", "http://host.example/"),
        ("http://host.example.evil/sql", "http://host.example"),
        ("http://host.example/public/../private", "http://host.example/public"),
        ("http://host.example/public/%2e%2e/private", "http://host.example/public"),
        ("http://host.example/public/..%2fprivate", "http://host.example/public"),
        ("http://host.example/public\\..\\private", "http://host.example/public"),
        ("s3://bucket-2/sql", "s3://bucket"),
        ("s3://bucket/sql::file:///etc", "s3://bucket"),
        ("local:///etc", "local://"),
        ("simplecache::http://host.example/sql", "http://"),
    ],
)
def test_only_what_is_allowed_is_asked_for(get: Any, source: str, allowed: str) -> None:
    with pytest.raises((SourceForbiddenError, AdapterNotFoundError)) as caught:
        get(source, allowed)
    if "://" in source.partition("::")[0]:
        assert isinstance(caught.value, SourceForbiddenError)


def test_a_scheme_that_nobody_knows(get: Any) -> None:
    with pytest.raises(SourceError, match="nobody://"):
        get("nobody://host/sql")


@pytest.fixture(scope="module")
def s3(adapter: Path) -> Iterator[str]:
    """The URL of a server that speaks S3, with the adapter in bucket "adapters" under "team/sql"."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        patch.setenv("AWS_ENDPOINT_URL", url)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket="adapters")
        for file in adapter.iterdir():
            client.upload_file(str(file), "adapters", f"team/sql/{file.name}")
        yield url
        server.stop()


@pytest.mark.usefixtures("s3")
def test_a_folder_in_s3(adapter: Path, get: Any) -> None:
    assert same(get("s3://adapters/team/sql"), adapter)
    assert get.progress.done == get.progress.total > 10_000
    assert same(get("s3://adapters/team/sql", cached=True), adapter)
    assert same(get("s3://adapters/team/sql", cached=True), adapter)
    with pytest.raises(AdapterNotFoundError):
        get("s3://adapters/team/other")
    with pytest.raises(LimitError):
        get("s3://adapters/team/sql", limits=replace(AdapterLimits(), file_bytes=1000))


HUB = """
import sys
from pathlib import Path
from hydraserve.adapters.checkpoint import load_adapter
from hydraserve.adapters.sources import DownloadCache, Progress, SourcePolicy, fetch
for i, source in enumerate(sys.argv[2:]):
    scratch = Path(sys.argv[1]) / str(i)
    scratch.mkdir()
    try:
        folder = fetch(source, SourcePolicy.of(["hf://"]), scratch, Progress(), DownloadCache(scratch / "cache"))
        print(load_adapter(folder).digest)
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_repository_of_the_hub_at_a_revision(adapter: Path, tmp_path: Path) -> None:
    other = make_adapter(SHAPES, ("q_proj",), 4, 3, seed=2)
    save_adapter(load_adapter(adapter), tmp_path / "hub" / "org" / "name" / "main")
    save_adapter(other, tmp_path / "hub" / "org" / "name" / "v2")
    with serving(HubHandler, tmp_path / "hub", commits={"main": COMMIT, "v2": "b" * 40}) as (url, handler):
        # The client reads its endpoint when it is imported.
        env = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        sources = ["hf://org/name", "hf://org/name@v2", "hf://org/name@v3", "hf://org/missing"]
        arguments = [sys.executable, "-c", HUB, str(tmp_path), *sources]
        lines = subprocess.run(arguments, env=env, check=True, capture_output=True, text=True).stdout.splitlines()
        assert lines[:2] == [load_adapter(adapter).digest, other.digest]
        assert [line.partition(" ")[0] for line in lines[2:]] == ["AdapterNotFoundError"] * 2
        files = [line for line in handler.requests if "/resolve/" in line]
        assert files
        assert all(COMMIT in line or "b" * 40 in line for line in files), "files of one commit"
