"""A server process: start, wait until it answers, stop. Used by the benchmark and by the tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from hydraserve.config import KEY_VARIABLES
from hydraserve.errors import EngineError

# An engine start takes about a minute on two cores, several when the machine is busy.
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
# vLLM's processes take about ten seconds to take themselves apart, which nobody needs to wait for.
HURRY_S = 1.0

# Arguments of the Python interpreter that start a server. vLLM's own is what the benchmark compares with: nothing of
# ours runs in it (with HYDRASERVE_PLUGIN=0), not even the command line.
HYDRASERVE = ("-m", "hydraserve.cli.main", "serve")
VLLM = ("-m", "vllm.entrypoints.openai.api_server")

# Variables of a server that only its starter talks to: with the user's own keys it would refuse that one.
NO_KEYS = dict.fromkeys(KEY_VARIABLES, "")


def free_port() -> int:
    """A TCP port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_line(log: Path) -> str:
    """What a process that failed said in the end."""
    return next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "nothing")


class ServerProcess:
    """A server on a free port of the loopback address, its output in `log`.

    arguments: of the server, without --host and --port.
    env:       variables added to this process's own.
    command:   which server, HYDRASERVE or VLLM.

    Use as a context manager. Raises EngineError, with the end of the log, when the server does not come up.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        command: Sequence[str] = HYDRASERVE,
    ) -> None:
        self.arguments, self.log, self.env = list(arguments), log, dict(env or {})
        self.start_timeout_s, self.command = start_timeout_s, tuple(command)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> ServerProcess:
        """Start the process and wait until /health answers."""
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, *self.command, *address, *self.arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env},
                start_new_session=True,  # so that stop() reaches its worker processes too
            )
        try:
            self._wait_until_healthy()
        except BaseException:  # Ctrl-C too: nobody else would stop it
            self.stop()
            raise
        return self

    def _wait_until_healthy(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + self.start_timeout_s
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise EngineError(
                    what="server start",
                    got=f"exit status {self.process.poll()}, its log ends with: {last_line(self.log)}",
                    expected=f"an answer on {self.url}/health within {self.start_timeout_s:.0f} s",
                    fix=f"see {self.log}",
                )
            time.sleep(0.25)

    def healthy(self) -> bool:
        """Whether /health answers 200."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self, timeout_s: float = STOP_TIMEOUT_S, hurry_s: float | None = None) -> int:
        """Signal the server, wait, and kill what is left of it; returns its exit status.

        hurry_s: the second signal, on which a server ends at once, comes after so many seconds; None: never.
        """
        assert self.process is not None
        try:
            for seconds in (timeout_s,) if hurry_s is None else (hurry_s, timeout_s):
                if self.process.poll() is None:
                    self.process.send_signal(signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self.process.wait(seconds)
        finally:  # after a second Ctrl-C too: nobody else would end it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def __enter__(self) -> ServerProcess:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.stop(hurry_s=HURRY_S)
