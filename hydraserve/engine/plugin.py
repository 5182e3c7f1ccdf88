"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes."""

from __future__ import annotations

from hydraserve.config import plugin_enabled


def register() -> None:
    """Extend vLLM in this process; HYDRASERVE_PLUGIN=0 leaves it alone. Light, and may run twice."""
    if plugin_enabled():
        from hydraserve.engine import compat, logs

        compat.apply()
        logs.shorten_errors()
