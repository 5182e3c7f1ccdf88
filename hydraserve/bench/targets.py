"""What an arm's requests go to: a server over HTTP, or the reference in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from hydraserve.bench.arms import BASE
from hydraserve.bench.client import drive
from hydraserve.bench.process import last_line
from hydraserve.bench.scrape import Scrape, scrape
from hydraserve.bench.stats import RequestRecord
from hydraserve.bench.workload import Load, Request
from hydraserve.errors import EngineError

STOP_TIMEOUT_S = 30.0


class Target(Protocol):
    """leader: the process whose session is its own, None when it was started by somebody else."""

    @property
    def leader(self) -> int | None: ...

    def scrape(self) -> Scrape:
        """What it says of itself; empty when it says nothing."""

    def run(self, requests: Sequence[Request], load: Load, on_done: Callable[[], None]) -> list[RequestRecord]:
        """Serve the requests; calls on_done after each."""


class HttpTarget:
    """An OpenAI-compatible server. key: what it asks for, if anything."""

    def __init__(self, url: str, leader: int | None, key: str | None = None) -> None:
        self.url, self.leader, self.key = url, leader, key

    def scrape(self) -> Scrape:
        return scrape(self.url, self.key)

    def run(self, requests: Sequence[Request], load: Load, on_done: Callable[[], None]) -> list[RequestRecord]:
        return drive(self.url, requests, load, on_done, self.key)


class ReferenceTarget:
    """`hydraserve.bench.reference` in its own process: one adapter at a time, the requests of one adapter in batches.

    env: variables added to this process's own.

    Use as a context manager. Raises EngineError, with the end of the log, when the process fails.
    """

    def __init__(
        self, arguments: Sequence[str], adapters: Mapping[str, Path], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.arguments = [*arguments, *(x for name, path in adapters.items() for x in ("--adapter", f"{name}={path}"))]
        self.log, self.env = log, dict(env or {})
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ReferenceTarget:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hydraserve.bench.reference", *self.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self.env},
                start_new_session=True,
            )
        try:
            self._answer()
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        process, requests, _ = self._running()
        if kind is not None:
            process.kill()
        requests.close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def leader(self) -> int | None:
        return self._process.pid if self._process else None

    def scrape(self) -> Scrape:
        return Scrape()

    def run(self, requests: Sequence[Request], load: Load, on_done: Callable[[], None]) -> list[RequestRecord]:
        """All requests wait from the start, `load.concurrency` of them at a time; each group of one adapter and one
        length is one call of generate."""
        records: list[RequestRecord] = []
        size = load.concurrency or 1
        for first in range(0, len(requests), size):
            start = time.perf_counter()
            groups: dict[tuple[str, int, int], list[Request]] = {}
            for request in requests[first : first + size]:
                groups.setdefault((request.model, len(request.prompt), request.output_tokens), []).append(request)
            for (model, length, output), group in groups.items():
                times = self._generate(model, output, [request.prompt for request in group])
                tokens = tuple((moment, i + 1) for i, moment in enumerate(times))
                for _ in group:
                    records.append(RequestRecord(model, start, tokens, length))
                    on_done()
        return records

    def _generate(self, model: str, output_tokens: int, prompts: Sequence[Sequence[int]]) -> list[float]:
        request = {"prompts": prompts, "adapter": None if model == BASE else model, "output_tokens": output_tokens}
        _, requests, _ = self._running()
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        times: list[float] = self._answer()["times"]
        return times

    def _answer(self) -> dict[str, Any]:
        process, _, answers = self._running()
        line = answers.readline()
        if not line:
            raise EngineError(
                what="the reference in transformers",
                got=f"exit status {process.wait()}, its log ends with: {last_line(self.log)}",
                expected="an answer",
                fix=f"see {self.log}",
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _running(self) -> tuple[subprocess.Popen[str], IO[str], IO[str]]:
        """The process, its stdin and its stdout."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        return process, process.stdin, process.stdout
