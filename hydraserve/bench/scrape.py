"""What a server says of itself at /metrics."""

from __future__ import annotations

import urllib.error
import urllib.request
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Scrape:
    """counters:    name of each counter of the server (vllm:*, hydraserve*) -> its sum over all labels.
    kv_tokens:   tokens that the KV cache holds, None when the server does not say.
    """

    counters: dict[str, float] = field(default_factory=dict)
    kv_tokens: int | None = None

    def since(self, before: Scrape) -> dict[str, float]:
        """How far each counter moved; those that did not are left out."""
        moved = {name: value - before.counters.get(name, 0.0) for name, value in self.counters.items()}
        return {name: value for name, value in moved.items() if value}


def key_header(key: str | None) -> dict[str, str]:
    """What a request shows of a server's key; nothing without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def scrape(url: str, key: str | None = None) -> Scrape:
    """Read `url`/metrics; empty when the server has none, or what is there are none (a proxy's page, say)."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/metrics", headers=key_header(key)), timeout=30
        ) as response:
            return parse(response.read().decode())
    except (urllib.error.URLError, OSError, ValueError):
        return Scrape()


def parse(text: str) -> Scrape:
    """Prometheus text -> Scrape. Raises ValueError for another text."""
    counters: dict[str, float] = {}
    kv_tokens = None
    for family in text_string_to_metric_families(text):
        if family.type == "counter" and family.name.startswith(("vllm:", "hydraserve")):
            counters[family.name] = sum(s.value for s in family.samples if s.name.endswith("_total"))
        if family.name == "vllm:cache_config_info":
            labels = family.samples[0].labels
            blocks = labels.get("num_gpu_blocks", "")
            if blocks.isdecimal():
                kv_tokens = int(blocks) * int(labels["block_size"])
    return Scrape(counters, kv_tokens)
