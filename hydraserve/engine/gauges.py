"""A series of vLLM's that the server writes instead, see `hydraserve.server.metrics.gateway`."""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY


def release_lora_gauge(engine: Any) -> None:
    """Take `vllm:lora_requests_info` away from vLLM's stat loggers, so that the name is free. May be called again."""
    manager = engine.logger_manager
    for logger in manager.stat_loggers if manager is not None else ():
        gauge = getattr(logger, "gauge_lora_info", None)
        if gauge is not None:
            REGISTRY.unregister(gauge)
            logger.gauge_lora_info = None
