"""Where a number comes from: written beside every measurement. Benchmarks import this before hydra_kernels."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parents[1]

# So that a benchmark is one command where nothing is installed, and measures the code of the commit that it names.
sys.path.insert(0, str(KERNELS))

PACKAGES = ("torch", "triton", "vllm")


def commit() -> str:
    """The commit, with "-dirty" when files of the kernels (but results) differ; "unknown" outside a repository."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("-dirty" if _git("status", "--porcelain", "--", ".", ":!benchmarks/results") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(KERNELS), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter; without those that are not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
