"""What the end-to-end tests of adapters share: small adapters on disk, and a client that says what answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from hydraserve.adapters.synthetic import make_adapter, save_adapter
from hydraserve.models import base_shapes

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = ((4, 3), (8, 2), (4, 1), (6, 4))  # rank, heads; the third is plain LoRA
HEADER = "x-hydraserve-adapter"


def write_adapters(base: Path, folder: Path, count: int) -> list[Path]:
    """`count` different adapters for `base`, of mixed ranks and heads: folder/v0, v1 ..."""
    shapes = base_shapes(str(base))
    paths = []
    for seed in range(count):
        rank, heads = SHAPES[seed % len(SHAPES)]
        path = folder / f"v{seed}"
        save_adapter(make_adapter(shapes, TARGETS, rank, heads, seed=seed), path)
        paths.append(path)
    return paths


@dataclass(frozen=True)
class Answer:
    """status: HTTP's; tokens: generated ids; version: the response header, "name@digest"; body: as received."""

    status: int
    tokens: tuple[int, ...]
    version: str
    finish: str
    body: dict[str, Any]

    @property
    def digest(self) -> str:
        return self.version.rpartition("@")[2]


def completion(model: str, prompt: Iterable[int], tokens: int, **fields: Any) -> dict[str, Any]:
    """The body of a greedy completion that does not stop early."""
    fixed = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": model, "prompt": list(prompt), "max_tokens": tokens, **fixed, **fields}


def answer_of(response: httpx.Response) -> Answer:
    body = response.json()
    choice = body["choices"][0] if response.status_code == 200 else {}
    return Answer(
        response.status_code,
        tuple(choice.get("token_ids") or ()),
        response.headers.get(HEADER, ""),
        choice.get("finish_reason") or "",
        body,
    )


class AdapterClient:
    """Calls of one server, for tests that run one after the other."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, timeout=120, headers=headers)

    def complete(self, model: str, prompt: Iterable[int], tokens: int = 8, **fields: Any) -> Answer:
        return answer_of(self.http.post("/v1/completions", json=completion(model, prompt, tokens, **fields)))

    def add(self, name: str, source: Path | str, **fields: Any) -> dict[str, Any]:
        return self._json(self.http.post("/v1/adapters", json={"name": name, "source": str(source), **fields}))

    def replace(self, name: str, source: Path | str | None = None) -> dict[str, Any]:
        body = {} if source is None else {"source": str(source)}
        return self._json(self.http.put(f"/v1/adapters/{name}", json=body))

    def remove(self, name: str, **params: Any) -> dict[str, Any]:
        return self._json(self.http.delete(f"/v1/adapters/{name}", params=params))

    def get(self, name: str) -> dict[str, Any]:
        return self._json(self.http.get(f"/v1/adapters/{name}"))

    def list(self) -> dict[str, Any]:
        return self._json(self.http.get("/v1/adapters"))

    def names(self) -> list[str]:
        return [card["name"] for card in self.list()["data"]]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(s.value for s in samples if all(s.labels.get(key) == value for key, value in labels.items()))

    def remove_all(self) -> None:
        for name in self.names():
            self.remove(name)

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        assert response.is_success, f"{response.status_code}: {response.text}"
        body: dict[str, Any] = response.json()
        return body


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
    """Until the condition holds; fails when it does not within the limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {what}"
        time.sleep(0.02)
