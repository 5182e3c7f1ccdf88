"""The series that gateways route by: always one sample, with the names that requests use."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import CollectorRegistry

from hydraserve.server.lifecycle.turnstile import Turnstile
from hydraserve.server.metrics.gateway import LoraRequestsInfo


def labels(registry: CollectorRegistry) -> dict[str, str]:
    (family,) = registry.collect()
    assert family.name == "vllm:lora_requests_info"
    (sample,) = family.samples
    return {key: str(value) for key, value in sample.labels.items()}


def served(name: str, requests: int) -> Any:
    stored = SimpleNamespace(digest=f"digest of {name}")
    return SimpleNamespace(name=name, stored=stored, request_ids=["id"] * requests)


def test_running_and_waiting_adapters_are_named_as_requests_name_them() -> None:
    async def run() -> None:
        turnstile = Turnstile(slots=1)
        current = {name: served(name, 1) for name in ("sql", "chat")} | {"idle": served("idle", 0)}
        registry = CollectorRegistry()
        registry.register(LoraRequestsInfo(cast(Any, SimpleNamespace(turnstile=turnstile, current=current)), 1))
        nobody = {"max_lora": "1", "running_lora_adapters": "", "waiting_lora_adapters": ""}
        assert labels(registry) == nobody
        await turnstile.enter("digest of sql")
        waiting = asyncio.create_task(turnstile.enter("digest of chat"))
        await asyncio.sleep(0)
        assert labels(registry) == {**nobody, "running_lora_adapters": "sql", "waiting_lora_adapters": "chat"}
        turnstile.leave("digest of sql")
        await waiting
        assert labels(registry) == {**nobody, "running_lora_adapters": "chat"}
        turnstile.leave("digest of chat")
        assert labels(registry) == nobody

    asyncio.run(run())
