"""`hydraserve adapters`: what is sent, what is shown, what is said when it fails."""

from __future__ import annotations

import json
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hydraserve.cli.main import FAILURE, USAGE_ERROR, main
from hydraserve.server.keys import hash_key, parse_key_file

CARD = {
    "name": "sql",
    "source": "s3://bucket/sql",
    "state": "host",
    "pinned": True,
    "version": "ab" * 32,
    "format": "hydralora",
    "rank": 8,
    "heads": 4,
    "bytes": 3 << 20,
    "requests_running": 2,
    "requests_served": 17,
    "progress": None,
    "error": None,
    "load_seconds": 0.25,
}
RESIDENCY = {
    **{"slots": ["sql", None], "host_adapters": 1, "host_capacity": 8, "host_bytes": 3 << 20},
    **{"kv_blocks": 10, "kv_blocks_free": 9},
}


class Answers(BaseHTTPRequestHandler):
    """Writes down what it is asked, and gives `status` and `body`."""

    asked: ClassVar[list[tuple[str, str, Any, str | None]]] = []
    status: ClassVar[int] = 200
    body: ClassVar[bytes] = b""

    def do_GET(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = (self.command, self.path, json.loads(content or "null"), self.headers.get("Authorization"))
        type(self).asked.append(asked)
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 (the library calls them so)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to the terminal."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answers]]:
    handler = type("Handler", (Answers,), {"asked": [], "body": json.dumps(CARD).encode()})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("HYDRASERVE_URL", f"http://127.0.0.1:{http.server_port}")
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("HYDRASERVE_ADMIN_API_KEY", "HYDRASERVE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("arguments", "method", "path", "body"),
    [
        (["load", "a", "hf://o/n"], "POST", "", {"name": "a", "source": "hf://o/n", "pin": False, "digest": None}),
        (["load", "a", "/x", "--pin"], "POST", "", {"name": "a", "source": "/x", "pin": True, "digest": None}),
        (["replace", "a"], "PUT", "/a", {"source": None, "pin": None, "digest": None}),
        (["replace", "t/a", "/x"], "PUT", "/t/a", {"source": "/x", "pin": None, "digest": None}),
        (["unload", "a"], "DELETE", "/a?force=false", None),
        (["unload", "a", "--force"], "DELETE", "/a?force=true", None),
        (["pin", "a"], "POST", "/a/pin", None),
        (["unpin", "a"], "POST", "/a/unpin", None),
        (["prefetch", "a"], "POST", "/a/prefetch", None),
        (["show", "a"], "GET", "/a", None),
    ],
)
def test_what_is_sent(
    server: type[Answers], arguments: list[str], method: str, path: str, body: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", *arguments]) == 0
    assert server.asked == [(method, f"/v1/adapters{path}", body, None)]
    assert capsys.readouterr().out.strip()


def test_paths_are_made_absolute_before_they_are_sent(server: type[Answers]) -> None:
    assert main(["adapters", "load", "a", "some/folder"]) == 0
    assert server.asked[0][2]["source"] == str(Path.cwd() / "some/folder")


def test_the_key_comes_from_the_environment_or_the_command_line(
    server: type[Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRASERVE_API_KEY", "user")
    main(["adapters", "show", "a"])
    monkeypatch.setenv("HYDRASERVE_ADMIN_API_KEY", "boss")
    main(["adapters", "show", "a"])
    main(["adapters", "show", "a", "--api-key", "other"])
    assert [asked[3] for asked in server.asked] == ["Bearer user", "Bearer boss", "Bearer other"]


def test_the_table(server: type[Answers], capsys: pytest.CaptureFixture[str]) -> None:
    loading = {**CARD, "name": "new", "state": "loading", "version": None, "progress": {"done": 1, "total": 4}}
    failed = {**CARD, "name": "bad", "state": "failed", "error": "rank: got 0"}
    server.body = json.dumps({"data": [CARD, loading, failed], "residency": RESIDENCY}).encode()
    assert main(["adapters", "list"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("│")}
    assert all(text in rows["sql"] for text in ("host", "yes", "hydralora", "3.0 MiB", "17", "abab", "s3://bucket/sql"))
    assert "loading 25 %" in rows["new"]
    assert "rank: got 0" in rows["bad"]
    assert "slots: sql, -; host memory: 1 of 8 adapters, 3.0 MiB; KV blocks: 9 of 10 free" in out
    server.body = json.dumps({"data": [], "residency": None}).encode()
    assert main(["adapters", "list"]) == 0
    assert capsys.readouterr().out == "no adapters\n"
    assert main(["adapters", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"data": [], "residency": None}


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (409, b'{"error": {"message": "the name is taken"}}', "error: the name is taken"),
        (500, b"oops", "status 500 without JSON"),
        (422, b'{"detail": "x"}', "status 422"),
        (400, b'["x"]', "status 400"),
    ],
)
def test_what_the_server_says_is_said(
    server: type[Answers], status: int, body: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status, server.body = status, body
    assert main(["adapters", "load", "a", "/x"]) == FAILURE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "no url", "ftp://x"])
def test_a_server_that_is_not_there(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "list", "--url", url]) == FAILURE
    error = capsys.readouterr().err
    assert "check that it runs" in error
    assert "Traceback" not in error


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["load", "a"], ["explode"], ["pin"]):
        with pytest.raises(SystemExit) as caught:
            main(["adapters", *arguments])
        assert caught.value.code == USAGE_ERROR
    assert "Traceback" not in capsys.readouterr().err


def test_a_new_key_and_its_entry(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--adapters", "sql,team-a-*", "--isolated", "--requests-per-minute", "600"]
    assert main(["adapters", "new-key", "team-a", *arguments]) == 0
    out = capsys.readouterr().out
    key = out.splitlines()[0].rpartition(" ")[2]
    (principal,) = parse_key_file(out).values()
    assert tomllib.loads(out)["key"][0]["sha256"] == hash_key(key)
    assert (principal.name, principal.adapters, principal.isolated) == ("team-a", ("sql", "team-a-*"), True)
    assert principal.rate == 600
    assert out.count(key) == 1
    assert len(key) > 40
