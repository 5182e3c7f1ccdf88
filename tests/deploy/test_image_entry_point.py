"""What the Dockerfile starts, started without a container engine: the same command and environment, no rights, and a
root file system that cannot be written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hydraserve.bench.process import ServerProcess, free_port

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
SERVE = DOCKERFILE[DOCKERFILE.index(" AS serve\n") :].replace("\\\n", " ")
INSTALLED = "/opt/hydraserve"
ISOLATED = ("--unshare-user", "--unshare-pid", "--unshare-ipc", "--cap-drop", "ALL", "--ro-bind", "/", "/")


def environment() -> dict[str, str]:
    """The variables that the image sets."""
    lines = re.findall(r"^ENV (.*)$", SERVE, re.MULTILINE)
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))


def exec_form(instruction: str, stage: str = "serve") -> list[str]:
    """The words of a stage's CMD or ENTRYPOINT."""
    (text,) = [part for part in re.split(r"^FROM ", SERVE, flags=re.MULTILINE) if f" AS {stage}\n" in part]
    match = re.search(rf"^{instruction} \[(.*)\]$", text, re.MULTILINE)
    assert match is not None
    return [word.strip().strip('"') for word in match[1].split(",")]


def volumes() -> list[str]:
    match = re.search(r"^VOLUME \[(.*)\]$", SERVE, re.MULTILINE)
    assert match is not None
    return [word.strip().strip('"') for word in match[1].split(",")]


def user() -> str:
    match = re.search(r"^ARG UID=(\d+)$", SERVE, re.MULTILINE)
    assert match is not None
    assert "USER ${UID}:${UID}" in SERVE
    return match[1]


def test_all_that_is_written_goes_to_the_volumes_and_tmp() -> None:
    written = [value for name, value in environment().items() if name.endswith(("_CACHE_HOME", "_HOME", "_CACHE_DIR"))]
    written = [path for path in written if not path.startswith(INSTALLED)]  # made when the image is
    assert len(written) >= 5
    assert [path for path in written if not path.startswith(tuple(volumes()))] == []
    assert int(user()) > 0


def test_what_the_build_copies_is_there_and_not_ignored() -> None:
    build = DOCKERFILE[: DOCKERFILE.index(" AS serve")]
    sources = [word for line in re.findall(r"^COPY (.*)$", build, re.MULTILINE) for word in line.split()[:-1]]
    assert len(sources) >= 6
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in allowed, source


def test_only_the_image_for_cpus_gives_a_size_of_the_kv_cache() -> None:
    demo = ["--model", "demo"]
    assert exec_form("CMD", "serve-cuda") == demo
    assert exec_form("CMD", "serve-cpu") == [*demo, "--kv-cache-memory-bytes", str(1 << 30)]
    assert DOCKERFILE.rstrip().endswith("\nFROM serve-${VARIANT}"), "the last stage is the image"


def library_cache() -> Path:
    """Where this user's builds of the CPU operator lie."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hydra_kernels"


def is_permitted() -> bool:
    """Whether this machine lets us make a user namespace with bubblewrap."""
    if shutil.which("bwrap") is None:
        return False
    command = ["bwrap", *ISOLATED, "--uid", "10001", "--gid", "10001", "--dev", "/dev", "--proc", "/proc", "true"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def contained(tiny_llama: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """The entry point in a namespace: this checkout in the image's place, everything but the volumes read-only."""
    entry = exec_form("ENTRYPOINT")
    assert entry[:2] == ["tini", "--"]  # the image's process 1; here bubblewrap is
    command = ["bwrap", "--die-with-parent", *ISOLATED, "--uid", user(), "--gid", user()]
    command += ["--dev", "/dev", "--proc", "/proc", "--tmpfs", "/opt", "--tmpfs", "/var", "--tmpfs", "/tmp"]
    command += ["--ro-bind", str(ROOT), INSTALLED, "--ro-bind", str(ROOT), str(ROOT)]  # scripts name the latter
    native = tmp_path / "native"  # the image has it built; compiling it here would only take time
    shutil.copytree(library_cache(), native) if library_cache().is_dir() else native.mkdir()
    command += ["--bind", str(native), "/tmp/native"]
    for i, volume in enumerate(volumes()):
        kept = tmp_path / f"volume-{i}"
        kept.mkdir()
        command += ["--bind", str(kept), volume]
    # The model lies below /tmp, which is hidden.
    command += ["--ro-bind", str(tiny_llama), "/tmp/model", "--clearenv"]
    port = free_port()
    variables = {**environment(), "HF_HUB_OFFLINE": "1", "HYDRA_KERNELS_CACHE": "/tmp/native"}
    for name, value in variables.items():
        command += ["--setenv", name, value]
    command += ["--chdir", "/var/lib/hydraserve", *entry[2:], *exec_form("CMD", "serve-cpu")]
    # Of a flag that is given twice the last one counts: a model that loads in no time instead of the demo.
    command += ["--model", "/tmp/model", "--served-model-name", "tiny"]
    command += ["--state-dir", volumes()[1], "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    server = ServerProcess([], tmp_path / "log")
    server.port, server.url = port, f"http://127.0.0.1:{port}"
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with server.log.open("wb") as log:
        server.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=dict(os.environ))
    try:
        server._wait_until_healthy()
        yield server
    finally:
        server.stop()


@pytest.mark.long
@pytest.mark.skipif(not is_permitted(), reason="needs Debian's package bubblewrap, and user namespaces")
def test_the_entry_point_serves_without_rights_on_a_read_only_file_system(contained: ServerProcess) -> None:
    assert httpx.get(f"{contained.url}/ready").json() == {"status": "ready"}
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    answer = httpx.post(f"{contained.url}/v1/completions", json=body, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 4
    assert "hydraserve is ready" in contained.log.read_text()
