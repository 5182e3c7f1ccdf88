"""Streams that are read beside a test."""

from __future__ import annotations

import threading
from typing import Any

import httpx


class Stream(threading.Thread):
    """A streamed completion. pieces: what came; error: how the connection ended, if not well.

    wait: return when the first piece is there.
    """

    def __init__(self, url: str, body: dict[str, Any], wait: bool = True) -> None:
        super().__init__(daemon=True)
        self.url, self.body = url, body
        self.pieces: list[str] = []
        self.error: Exception | None = None
        self.running = threading.Event()
        self.start()
        if wait:
            assert self.running.wait(60)

    def run(self) -> None:
        try:
            # verify: of no use without TLS, and making its context takes long
            with httpx.stream(
                "POST", f"{self.url}/v1/completions", json=self.body, timeout=60, verify=False
            ) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.pieces.append(line[6:])
                        self.running.set()
        except httpx.HTTPError as error:
            self.error = error
