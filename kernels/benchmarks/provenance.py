"""Where a number comes from: written beside every measurement of the GPU benchmarks."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("torch", "triton", "vllm")


def commit() -> str:
    """The commit, with "-dirty" when files of the kernels (but results) differ; "unknown" outside a repository."""
    kernels = Path(__file__).parents[1]
    try:
        head = _git("rev-parse", "--short=12", "HEAD", folder=kernels)
        return head + (
            "-dirty" if _git("status", "--porcelain", "--", ".", ":!benchmarks/results", folder=kernels) else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str, folder: Path) -> str:
    command = ["git", "-C", str(folder), *arguments]
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
