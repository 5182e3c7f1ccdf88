"""Every Prometheus series of HydraServe, in one list. vLLM's own (`vllm:...`) stand beside them on /metrics.

Label `adapter`: the name that requests use, for the busiest adapters; "other" for the rest, "base" for the base model
(see `server/metrics/labels.py`). With several API server processes, counters and histograms are sums over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "hydraserve_"

# Seconds. From a cached prompt on a GPU to a long one on two cores.
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
LOAD_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)

ADAPTER = ("adapter",)


class Metrics:
    """The series, registered in `registry`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        def histogram(name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
            return Histogram(PREFIX + name, text, labels, registry=registry, buckets=buckets)

        # What the engine says is the same for every API server process: the last one that asked is right.
        def gauge(
            name: str, text: str, labels: Sequence[str] = (), mode: Literal["mostrecent", "livesum"] = "mostrecent"
        ) -> Gauge:
            return Gauge(PREFIX + name, text, labels, registry=registry, multiprocess_mode=mode)

        # Requests.
        self.requests = counter(
            "adapter_requests", "Requests that ended: stop, length, abort, error, ...", (*ADAPTER, "outcome")
        )
        self.prompt_tokens = counter("adapter_prompt_tokens", "Prompt tokens of requests that ended.", ADAPTER)
        self.generated_tokens = counter("adapter_generated_tokens", "Tokens generated for them.", ADAPTER)
        self.first_token_seconds = histogram(
            "adapter_time_to_first_token_seconds",
            "From the request's arrival to its first token, waiting for the adapter included.",
            ADAPTER,
            FIRST_TOKEN_BUCKETS,
        )
        self.token_seconds = histogram(
            "adapter_time_per_output_token_seconds",
            "Mean time between two tokens of a request, from its first token on.",
            ADAPTER,
            TOKEN_BUCKETS,
        )
        self.request_seconds = histogram(
            "adapter_request_duration_seconds", "From a request's arrival to its end.", ADAPTER, REQUEST_BUCKETS
        )
        self.running = gauge("adapter_requests_running", "Requests that get tokens.", ADAPTER, mode="livesum")
        self.waiting = gauge(
            "adapter_requests_waiting",
            "Requests without a token yet: their adapter, a place, or their prompt comes first.",
            ADAPTER,
            mode="livesum",
        )

        # Adapters: where they are.
        self.loads = counter(
            "adapter_loads", "Times an adapter was put into a place: host memory, or a slot.", (*ADAPTER, "place")
        )
        self.evictions = counter("adapter_evictions", "Times an adapter was taken out of a place.", (*ADAPTER, "place"))
        self.load_seconds = histogram(
            "adapter_load_seconds", "Time to read and pack an adapter into host memory.", ADAPTER, LOAD_BUCKETS
        )
        self.adapter_bytes = gauge("adapter_bytes", "Host memory that the adapter takes in one worker.", ADAPTER)
        self.adapter_state = gauge(
            "adapter_state", "1 for the fastest place that the adapter is in: slot or host.", (*ADAPTER, "state")
        )
        self.slots = gauge("slots", "Adapters that can be in one batch; added up over data-parallel engines.")
        self.slots_used = gauge("slots_used", "Slots that hold an adapter.")
        self.slot_hits = counter("slot_hits", "Times requests for an adapter began and it was in a slot already.")
        self.slot_misses = counter("slot_misses", "Times an adapter had to be copied into a slot for the next step.")
        self.host_cache_capacity = gauge("host_cache_capacity", "Adapters that host memory may hold.")
        self.host_cache_adapters = gauge("host_cache_adapters", "Adapters in host memory.")
        self.host_cache_bytes = gauge("host_cache_bytes", "Host memory that adapters take in one worker.")
        self.host_cache_hits = counter("host_cache_hits", "Requests whose adapter was in host memory.")
        self.host_cache_misses = counter("host_cache_misses", "Requests whose adapter had to be loaded first.")

        # Routers; only with --router-metrics on.
        self.router_weight = counter(
            "router_weight", "Sum of a head's routing weights over tokens and layers.", (*ADAPTER, "module", "head")
        )
        self.router_tokens = counter(
            "router_tokens", "Tokens routed, times layers: what the weights of all heads sum to.", (*ADAPTER, "module")
        )
        self.router_entropy = counter(
            "router_entropy",
            "Sum of the routing weights' entropy over tokens and layers, 1 when all heads weigh the same.",
            (*ADAPTER, "module"),
        )
        self.router_collapsed = gauge(
            "router_collapsed_ratio",
            "Share of the adapter's routers that lately gave one head more than 95% of the weight.",
            ADAPTER,
        )
        self.router_sampled_steps = counter("router_sampled_steps", "Engine steps that routers were observed in.")

    def per_adapter(self) -> list[Counter | Gauge | Histogram]:
        """The series with a label `adapter`."""
        return [metric for metric in vars(self).values() if "adapter" in metric._labelnames]
