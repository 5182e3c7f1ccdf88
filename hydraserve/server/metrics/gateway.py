"""What routers in front of several servers read: which adapters each of them serves at the moment.

LoRA-aware gateways (Kubernetes' Gateway API Inference Extension, llm-d) take their decision from
`vllm:lora_requests_info`. vLLM's own series of that name has a label value for every combination of adapters that ever
ran together, names adapters as the engine does, and does not know those that wait for a slot.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from hydraserve.server.lifecycle.service import AdapterService


class LoraRequestsInfo(Collector):
    """One sample with the names of the running and of the waiting adapters; its value is the time."""

    def __init__(self, service: AdapterService, slots: int) -> None:
        self._service, self._slots = service, slots

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters whose requests run, or wait for their turn, at this moment.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        turnstile = self._service.turnstile
        served = list(self._service.current.values())
        running = sorted(s.name for s in served if s.request_ids and turnstile.running(s.stored.digest))
        waiting = sorted(s.name for s in served if s.request_ids and turnstile.waiting(s.stored.digest))
        family.add_metric([str(self._slots), ",".join(running), ",".join(waiting)], time.time())
        yield family
