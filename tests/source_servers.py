"""Real servers of the protocols that adapters come over, on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar


class FileHandler(BaseHTTPRequestHandler):
    """Files below a folder, with ranges, ETags, and as many failures as a test wants.

    failures: answers 503 that are still to be given. drops: bodies that are still to be cut short.
    """

    root: ClassVar[Path]
    failures: ClassVar[int] = 0
    drops: ClassVar[int] = 0
    sizes: ClassVar[bool] = True
    requests: ClassVar[list[str]]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        kind = type(self)
        kind.requests.append(f"{self.command} {self.path}")
        if kind.failures > 0:
            kind.failures -= 1
            self.reply(503, b"")
            return
        data = self.content(self.path.partition("?")[0])
        if data is None:
            self.reply(404, b"")
            return
        status, headers = 200, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if kind.sizes and (wanted := self.headers.get("Range")):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(data)), len(data) - 1)
            status, headers["Content-Range"] = 206, f"bytes {begin}-{end}/{len(data)}"
            data = data[begin : end + 1]
        self.reply(status, data, headers, body)

    def content(self, path: str) -> bytes | None:
        file = self.root / path.lstrip("/")
        return file.read_bytes() if file.is_file() else None

    def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
        kind = type(self)
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if kind.sizes:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if body and kind.drops > 0 and len(data) > 1000:
            kind.drops -= 1
            data, self.close_connection = data[: len(data) // 2], True
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to the terminal."""


class HubHandler(FileHandler):
    """The endpoints of the Hugging Face Hub that a download uses; repositories are folders root/org/name/revision."""

    commits: ClassVar[dict[str, str]]  # revision -> commit

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"]:
            type(self).requests.append(f"GET {self.path}")
            name, revision = "/".join(path[2:4]), path[5] if len(path) > 5 else "main"
            folder = self.folder(name, revision)
            if path[4:5] == ["tree"] and folder is not None:
                self.json([self.entry(folder, file.name) for file in folder.iterdir()])
            else:
                self.model(name, revision)
        else:
            super().do_GET()

    def do_POST(self) -> None:
        """paths-info: what the files are."""
        type(self).requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        wanted = json.loads(body)["paths"] if body.startswith("{") else form_values(body, "paths")
        path = self.path.strip("/").split("/")
        folder = self.folder("/".join(path[2:4]), path[5])
        self.json([self.entry(folder, name) for name in wanted if folder and (folder / name).is_file()])

    def model(self, name: str, revision: str) -> None:
        folder = self.folder(name, revision)
        if folder is None:
            headers = {"X-Error-Code": "RevisionNotFound" if (self.root / name).is_dir() else "RepoNotFound"}
            self.reply(404, b"{}", headers)
            return
        files = [{"rfilename": file.name} for file in folder.iterdir()]
        self.json({"id": name, "modelId": name, "sha": self.commit(revision), "siblings": files})

    def folder(self, name: str, revision: str) -> Path | None:
        names = {commit: revision for revision, commit in self.commits.items()}
        folder = self.root / name / names.get(revision, revision)
        return folder if folder.is_dir() else None

    def commit(self, revision: str) -> str:
        return self.commits.get(revision, revision)

    def entry(self, folder: Path, name: str) -> dict[str, Any]:
        data = (folder / name).read_bytes()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if not name.endswith(".json"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def content(self, path: str) -> bytes | None:
        """/org/name/resolve/revision/file"""
        if "/resolve/" not in path:
            return None
        org, name, _, revision, file = path.strip("/").split("/", 4)
        folder = self.folder(f"{org}/{name}", revision)
        return (folder / file).read_bytes() if folder is not None and (folder / file).is_file() else None

    def json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def form_values(body: str, name: str) -> list[str]:
    from urllib.parse import parse_qs

    return parse_qs(body).get(name, [])


@contextmanager
def serving(kind: type[FileHandler], root: Path, **attributes: Any) -> Iterator[tuple[str, type[FileHandler]]]:
    """(URL, handler class) of a server for as long as the context lasts."""
    handler = type(kind.__name__, (kind,), {"root": root, "requests": [], **attributes})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
