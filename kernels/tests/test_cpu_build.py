"""Building and choosing the native library: once, whole or not at all, and never in the way when it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hydra_kernels.ops import build

# A compiler that writes its command line to $LOG and a few bytes to the file after -o.
FAKE_COMPILER = """#!/bin/sh
case "$*" in *--version*) echo fake 1.0; exit 0;; esac
echo "$@" >> "$LOG"
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo library > "$2"; shift; done
"""
REPORT = """
import torch, hydra_kernels as hk
from hydra_kernels.ops import build
slots = hk.make_slots(1, 8, (8,), hk.SlotCapacity(12, 32, 4), torch.float32, "cpu")
hk.make_slots(1, 8, (8,), hk.SlotCapacity(12, 32, 4), torch.float32, "cpu")
print(type(slots).__name__, build.load().isa)
"""


def start(script: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def compiler(folder: Path, script: str) -> str:
    path = folder / "fake-compiler"
    path.write_text(script)
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_the_torch_path_serves_and_says_so_once(tmp_path: Path) -> None:
    output, errors = start(REPORT, CXX="/no/such/compiler", HYDRA_KERNELS_CACHE=str(tmp_path)).communicate()
    assert output.split() == ["StackedSlots", "None"]
    assert errors.count("no C++ compiler found; install g++, or set CXX to one") == 1


def test_a_failing_build_leaves_nothing_and_gives_the_compilers_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = "#!/bin/sh\necho note >&2; echo 'x.cpp:1: error: boom' >&2; exit 1\n"
    monkeypatch.setenv("CXX", compiler(tmp_path, failing))
    monkeypatch.setenv("HYDRA_KERNELS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match=r"failed: x.cpp:1: error: boom"):
        build.library()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["build.lock"]


def test_a_compiler_that_makes_no_library_is_a_failure_too(tmp_path: Path) -> None:
    """The file is there but cannot be loaded."""
    cxx = compiler(tmp_path, FAKE_COMPILER)
    env = {"CXX": cxx, "HYDRA_KERNELS_CACHE": str(tmp_path / "cache"), "LOG": str(tmp_path / "log")}
    output, errors = start(REPORT, **env).communicate()
    assert output.split() == ["StackedSlots", "None"]
    assert errors.count("RuntimeWarning: CPU kernels: using the slower torch path") == 1


def test_those_who_start_together_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock belongs to an open file: threads that each open it exclude one another as processes do."""
    monkeypatch.setenv("HYDRA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("CXX", compiler(tmp_path, FAKE_COMPILER))
    with ThreadPoolExecutor(4) as pool:
        paths = {future.result() for future in [pool.submit(build.library) for _ in range(4)]}
    assert len(paths) == 1
    assert paths.pop().read_text() == "library\n"
    assert sum(line.startswith("-shared ") for line in (tmp_path / "log").read_text().splitlines()) == 1


def test_a_cached_library_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image may be built with a compiler and run without one."""
    monkeypatch.setenv("HYDRA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("CXX", compiler(tmp_path, FAKE_COMPILER))
    built = build.library()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert build.library() == built


def test_another_compiler_or_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("CXX", compiler(tmp_path, FAKE_COMPILER))
    first = build.library()
    monkeypatch.setenv("CXX", compiler(tmp_path, FAKE_COMPILER.replace("fake 1.0", "fake 1.1")))
    second = build.library()
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "ops.cpp").write_text("// other")
    monkeypatch.setattr(build, "SOURCES", sources)
    assert len({first, second, build.library()}) == 3


def test_an_unusable_cache_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYDRA_KERNELS_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="set HYDRA_KERNELS_CACHE to another"):
        build.library()


def test_switched_off(tmp_path: Path) -> None:
    output, errors = start(REPORT, HYDRA_KERNELS_NATIVE="0", HYDRA_KERNELS_CACHE=str(tmp_path)).communicate()
    assert output.split() == ["StackedSlots", "None"]
    assert "CPU kernels" not in errors  # as asked: nothing to warn about
    assert not list(tmp_path.iterdir())


def test_the_instruction_set_can_be_lowered() -> None:
    assert build.load().isa is not None
    output, _ = start(REPORT, HYDRA_KERNELS_ISA="portable").communicate()
    assert output.split() == ["PackedSlots", "portable"]


def test_unknown_instruction_sets_are_refused() -> None:
    assert build.load().isa is not None
    with pytest.raises(RuntimeError, match="got sse9, expected avx512bf16, avx512, avx2 or portable"):
        torch.ops.hydra_kernels.cpu_isa("sse9")


def test_the_library_brings_no_openmp_of_its_own() -> None:
    """It names OpenMP's functions but no library that has them: torch's runtime serves, not a second one."""
    assert build.load().isa is not None
    content = build.library().read_bytes()
    assert b"GOMP_parallel" in content
    assert b"libgomp" not in content


def test_the_command_builds_and_reports() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "hydra_kernels.ops.build"], capture_output=True, text=True, check=True
    )
    assert f"{build.library()}, instruction set" in done.stdout
