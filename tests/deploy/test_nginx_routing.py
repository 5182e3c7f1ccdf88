"""The reverse proxy of deploy/nginx in front of two small servers that say which one they are."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

NGINX = Path(__file__).resolve().parents[2] / "deploy" / "nginx"
MODULE = Path("/usr/lib/nginx/modules/ngx_http_js_module.so")

pytestmark = pytest.mark.skipif(
    shutil.which("nginx") is None or not MODULE.exists(),
    reason="needs Debian's packages nginx-light and libnginx-mod-http-js",
)


class Replica(ThreadingHTTPServer):
    """Answers with its own port and the length of the body. ending: answers 503 instead."""

    daemon_threads = True
    ending = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        assert isinstance(self.server, Replica)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = json.dumps({"replica": self.server.server_port, "length": len(body)}).encode()
        self.send_response(503 if self.server.ending else 200)
        if self.server.ending:
            self.send_header("Retry-After", "7")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Nothing: the test says what went wrong."""


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    servers = [Replica(), Replica()]
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def proxy(replicas: list[Replica], tmp_path: Path) -> Iterator[httpx.Client]:
    folder = tmp_path / "nginx"
    shutil.copytree(NGINX, folder)
    free = Replica()
    port = free.server_port
    free.shutdown()
    free.server_close()
    (folder / "listen.conf").write_text(f"listen 127.0.0.1:{port};")
    upstream = (folder / "upstream.conf").read_text()
    for place, replica in zip(("127.0.0.1:8001", "127.0.0.1:8002"), replicas, strict=True):
        upstream = upstream.replace(place, f"127.0.0.1:{replica.server_port}")
    (folder / "upstream.conf").write_text(upstream)
    command = ["nginx", "-p", str(folder), "-c", "nginx.conf", "-e", "error.log", "-g", "daemon off;"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)
    deadline = time.monotonic() + 10
    while True:
        with contextlib.suppress(httpx.TransportError):
            client.get("/health")
            break
        assert process.poll() is None, (folder / "error.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield client
    client.close()
    process.terminate()
    process.wait(10)


def replica_of(proxy: httpx.Client, model: object, padding: int = 0) -> int:
    body = json.dumps({"prompt": "x" * padding, "model": model}).encode()
    answer = proxy.post("/v1/completions", content=body).raise_for_status().json()
    assert answer["length"] == len(body), "the body arrives whole"
    return int(answer["replica"])


def test_a_model_keeps_its_replica_and_models_share_the_replicas(proxy: httpx.Client) -> None:
    names = [f"adapter-{i}" for i in range(40)]
    first = {name: replica_of(proxy, name) for name in names}
    assert {name: replica_of(proxy, name) for name in reversed(names)} == first
    shares = [list(first.values()).count(replica) for replica in set(first.values())]
    assert len(shares) == 2
    assert min(shares) > 5


def test_large_bodies_are_looked_into(proxy: httpx.Client) -> None:
    small = replica_of(proxy, "adapter-1")
    assert replica_of(proxy, "adapter-1", padding=5 << 20) == small
    assert proxy.post("/v1/completions", content=b"x" * (17 << 20)).status_code == 413


def test_what_names_no_model_is_passed_on(proxy: httpx.Client) -> None:
    for body in (b"", b"no JSON", b"[1]", b'{"model": 7}', b'{"model": null}', b"\xff\xfe"):
        assert proxy.post("/v1/completions", content=body).json()["length"] == len(body)
    assert proxy.get("/metrics").status_code == 200


def test_a_replica_that_refuses_is_passed_over(proxy: httpx.Client, replicas: list[Replica]) -> None:
    owner = replica_of(proxy, "adapter-1")
    (ending,) = [replica for replica in replicas if replica.server_port == owner]
    ending.ending = True
    assert replica_of(proxy, "adapter-1") != owner


def test_a_moment_in_which_all_are_full_ends_with_it(proxy: httpx.Client, replicas: list[Replica]) -> None:
    owner = replica_of(proxy, "adapter-1")
    for replica in replicas:
        replica.ending = True
    for _ in range(3):
        refused = proxy.post("/v1/completions", json={"model": "adapter-1"})
        assert (refused.status_code, refused.headers.get("retry-after")) == (503, "7")
    for replica in replicas:
        replica.ending = False
    assert replica_of(proxy, "adapter-1") == owner, "at once, and on the replica that has the adapter"
