"""Servers that a command started end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hydraserve.bench.process import ServerProcess
from hydraserve.bench.usage import session_processes
from hydraserve.cli.signals import Terminated, terminable
from hydraserve.errors import EngineError

# A server that answers /health, with a child as an engine has; its arguments are --host ADDRESS --port PORT.
SERVER = """\
import http.server, subprocess, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[4])), Health).serve_forever()
"""

# A command that starts such a server, tells its session, and works on.
COMMAND = f"""\
import sys
from pathlib import Path
from hydraserve.bench.process import ServerProcess
from hydraserve.cli.signals import terminable
with terminable(), ServerProcess([], Path(sys.argv[1]), command=("-c", {SERVER!r})) as server:
    print(server.process.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_ends_its_servers(tmp_path: Path, number: signal.Signals) -> None:
    arguments = [sys.executable, "-c", COMMAND, str(tmp_path / "log")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        session = int(command.stdout.readline())
        assert len(session_processes(session)) == 2
        command.send_signal(number)
        assert command.wait(60) == 128 + number, "as shells give it"
    assert session_processes(session) == []


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    fails = ServerProcess([], tmp_path / "log", command=("-c", "print('x' * 10_000); raise SystemExit('no such port')"))
    with pytest.raises(EngineError, match="exit status 1, its log ends with: no such port"), fails:
        pass


def test_a_second_signal_does_not_interrupt_the_stopping() -> None:
    stopped = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            stopped.append("server")

    with pytest.raises(Terminated) as raised, terminable():
        work()
    assert stopped == ["server"]
    assert (raised.value.name, raised.value.status) == ("SIGTERM", 143)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
