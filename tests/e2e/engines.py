"""Servers as the tests start them: small, offline, and with as few processes as their subject allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hydraserve.bench.process import ServerProcess

# A small KV cache; no network.
ENGINE_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def one_process_engine(arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> ServerProcess:
    """A server whose engine runs the model in its own process, as is vLLM's default on one GPU. On CPUs that default is
    another process, which takes a third of the time of a start: the tests that share a server start that one."""
    variables = {**ENGINE_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(env or {})}
    return ServerProcess([*arguments, "--distributed-executor-backend", "uni"], log, variables)
