"""Mixed traffic for a long time, with adapters that come and go: every answer right, no 5xx, memory flat.

    .venv/bin/python benchmarks/soak.py --minutes 30 --output build/soak.json

Starts a server on the demo model, learns what each adapter answers when nothing else
runs, and then asks from several clients at once: streams, whole answers, samples, chats, requests that are given up
half-way, for adapters that another task adds, replaces and removes meanwhile. Every greedy answer carries the digest of
the content that it was computed with and is compared with what that content answers alone. Memory is what all the
server's processes have allocated. What adapters take goes up and down with them, so at the end of each round
everything is brought to rest, no request and no adapter of the traffic left; the slope is fitted over these moments in
the second half of the run, when caches are full. oneDNN keeps what it compiled for each number of tokens that a step
ever had, about 2 MiB each in float32. On a slow machine half an hour of this traffic does not show it them all, so the
server is started with that cache small: the slope is of what the server keeps.

Exit status 0 only when no answer was wrong, none was a 5xx, and memory grew by less than --max-slope.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.bench.machine import provenance
from hydraserve.bench.process import ServerProcess
from hydraserve.bench.usage import memory
from hydraserve.models import base_shapes, resolve_model

HEADER = "x-hydraserve-adapter"
NAMES, CONTENTS, TOKENS = 6, 8, 6
PROMPTS = tuple(tuple((7 * i * j + 11 * i + 3) % 500 + 5 for j in range(36 + 9 * i)) for i in range(1, 5))
SAMPLE_S, ROUND_S, SETTLE_S = 2.0, 60.0, 1.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Soak:
    """What happened. memory, at_rest: (seconds since the start, bytes), all the time and at the end of each round."""

    answers: int = 0
    compared: int = 0
    given_up: int = 0
    changes: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    at_rest: list[tuple[float, int]] = field(default_factory=list)

    @property
    def server_errors(self) -> int:
        return sum(count for status, count in self.statuses.items() if status >= 500)

    def slope(self) -> float:
        """Bytes an hour at rest, over the second half; 0 without enough rounds."""
        later = self.at_rest[len(self.at_rest) // 2 :]
        if len(later) < 3:
            return 0.0
        seconds, bytes_ = np.array(later, dtype=np.float64).T
        return float(np.polyfit(seconds, bytes_, 1)[0]) * 3600


def greedy(model: str, prompt: Sequence[int], **fields: Any) -> dict[str, Any]:
    fixed = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": model, "prompt": list(prompt), **fixed, **fields}


class Traffic:
    """Clients, and the task that changes adapters. known: (digest, prompt number) -> tokens; "" is the base model."""

    def __init__(self, http: httpx.AsyncClient, sources: Sequence[Path], soak: Soak) -> None:
        self.http, self.sources, self.soak = http, sources, soak
        self.names, self.base = [f"soak-{i}" for i in range(NAMES)], ""
        self.known: dict[tuple[str, int], tuple[int, ...]] = {}

    async def learn(self) -> None:
        """What each content answers alone."""
        self.base = (await self.http.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        for source in self.sources:
            await self._changed(self.http.post("/v1/adapters", json={"name": "alone", "source": str(source)}))
            for i in range(len(PROMPTS)):
                tokens, digest = await self._complete("alone", i)
                self.known[digest, i] = tokens
            await self._changed(self.http.delete("/v1/adapters/alone"))
        for i in range(len(PROMPTS)):
            self.known["", i] = (await self._complete(self.base, i))[0]

    async def _complete(self, model: str, prompt: int) -> tuple[tuple[int, ...], str]:
        answer = (await self.http.post("/v1/completions", json=greedy(model, PROMPTS[prompt]))).raise_for_status()
        return tuple(answer.json()["choices"][0]["token_ids"]), digest_of(answer)

    async def rounds(self, seconds: float, round_s: float, clients: int) -> AsyncIterator[None]:
        """Traffic for so long; yields at the end of each round, when all is at rest."""
        changes, *asks = (random.Random(seed) for seed in range(clients + 1))
        over = time.monotonic() + seconds
        while time.monotonic() < over:
            end = min(over, time.monotonic() + round_s)
            await asyncio.gather(*(self._client(end, rng) for rng in asks), self._changes(end, changes))
            for name in self.names:
                await self.http.delete(f"/v1/adapters/{name}", params={"wait": True})
            await asyncio.sleep(SETTLE_S)  # requests that were given up, memory that is given back
            yield

    async def _client(self, end: float, rng: random.Random) -> None:
        kinds = (self._whole, self._stream, self._sampled, self._chat, self._give_up)
        while time.monotonic() < end:
            model, prompt = rng.choice([*self.names, self.base]), rng.randrange(len(PROMPTS))
            await rng.choices(kinds, weights=(6, 4, 1, 1, 1))[0](model, prompt, rng)

    async def _whole(self, model: str, prompt: int, _: random.Random) -> None:
        answer = await self.http.post("/v1/completions", json=greedy(model, PROMPTS[prompt]))
        if self._seen(answer, model):
            self._compare(answer, prompt, tuple(answer.json()["choices"][0]["token_ids"]))

    async def _stream(self, model: str, prompt: int, _: random.Random) -> None:
        tokens: list[int] = []
        body = greedy(model, PROMPTS[prompt], stream=True)
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self.soak.wrong.append(f"error in a stream: {event['error']}")
                        return
                    tokens += event["choices"][0].get("token_ids") or []
        if self._seen(answer, model):
            self._compare(answer, prompt, tuple(tokens))

    async def _sampled(self, model: str, prompt: int, rng: random.Random) -> None:
        body = greedy(model, PROMPTS[prompt], temperature=1, seed=rng.randrange(1 << 30), n=2, logprobs=3)
        answer = await self.http.post("/v1/completions", json=body)
        if self._seen(answer, model):
            lengths = [len(choice["token_ids"]) for choice in answer.json()["choices"]]
            if lengths != [TOKENS, TOKENS]:
                self.soak.wrong.append(f"{model}: {lengths} tokens in 2 samples")

    async def _chat(self, model: str, _: int, rng: random.Random) -> None:
        messages = [{"role": "user", "content": f"Say {rng.randrange(100)}."}]
        body = {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
        self._seen(await self.http.post("/v1/chat/completions", json=body), model)

    async def _give_up(self, model: str, prompt: int, rng: random.Random) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            body = greedy(model, PROMPTS[prompt], max_tokens=300)
            self._seen(await self.http.post("/v1/completions", json=body, timeout=rng.uniform(0.01, 0.3)), model)
            return
        self.soak.given_up += 1

    def _seen(self, answer: httpx.Response, model: str) -> bool:
        """Count an answer; whether there is something in it. 404 is right for an adapter that has gone."""
        self.soak.answers += 1
        self.soak.statuses[answer.status_code] += 1
        if answer.status_code != 200 and (answer.status_code != 404 or model == self.base):
            self.soak.wrong.append(f"{model}: status {answer.status_code}")
        return answer.status_code == 200

    def _compare(self, answer: httpx.Response, prompt: int, tokens: tuple[int, ...]) -> None:
        self.soak.compared += 1
        digest = digest_of(answer)
        if tokens != self.known[digest, prompt]:
            self.soak.wrong.append(f"{digest[:12]} prompt {prompt}: {tokens}, expected {self.known[digest, prompt]}")

    async def _changes(self, end: float, rng: random.Random) -> None:
        while time.monotonic() < end:
            name, source = rng.choice(self.names), str(rng.choice(self.sources))
            path = f"/v1/adapters/{name}"
            match rng.randrange(8):
                case 0 | 1:
                    await self._changed(self.http.delete(path, params={"wait": rng.random() < 0.5}))
                case 2 | 3:
                    await self._changed(self.http.put(path, json={"source": source}))
                case 4:
                    await self._changed(self.http.post(f"{path}/prefetch"))
                case _:
                    await self._changed(self.http.post("/v1/adapters", json={"name": name, "source": source}))
            await asyncio.sleep(rng.uniform(0, 0.4))

    async def _changed(self, request: Any) -> None:
        """A change may come too late (404) or too early (409), and is never the server's fault."""
        status = (await request).status_code
        self.soak.changes += 1
        self.soak.statuses[status] += 1
        if status not in (200, 201, 202, 404, 409):
            self.soak.wrong.append(f"a change of adapters: status {status}")


def digest_of(answer: httpx.Response) -> str:
    return answer.headers.get(HEADER, "").rpartition("@")[2]


async def soak(
    url: str, leader: int, sources: Sequence[Path], seconds: float, clients: int, round_s: float = ROUND_S
) -> Soak:
    """Run it against the server at `url`, whose first process is `leader`."""
    found = Soak()
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        traffic = Traffic(http, sources, found)
        await traffic.learn()
        started = time.monotonic()

        async def sample() -> tuple[float, int]:
            return time.monotonic() - started, await asyncio.to_thread(lambda: memory(leader).allocated)

        async def sample_always() -> None:
            while True:
                found.memory.append(await sample())
                await asyncio.sleep(SAMPLE_S)

        sampling = asyncio.create_task(sample_always())
        try:
            async for _ in traffic.rounds(seconds, round_s, clients):
                found.at_rest.append(await sample())
                print(progress(found, seconds), file=sys.stderr, flush=True)
        finally:
            sampling.cancel()
    return found


def progress(found: Soak, seconds: float) -> str:
    """One line on the round that has just ended."""
    elapsed, size = found.at_rest[-1]
    counts = f"{found.answers:,} answers, {found.changes:,} changes, {len(found.wrong)} wrong"
    return f"{elapsed / 60:.0f} of {seconds / 60:.0f} min: {counts}, {size >> 20:,} MiB at rest"


def report(found: Soak, seconds: float) -> dict[str, Any]:
    sizes = [size >> 20 for _, size in found.memory]
    return {
        "seconds": round(seconds),
        "answers": found.answers,
        "compared": found.compared,
        "given_up": found.given_up,
        "changes": found.changes,
        "statuses": {str(status): count for status, count in sorted(found.statuses.items())},
        "wrong": len(found.wrong),
        "first_wrong": found.wrong[:5],
        "server_errors": found.server_errors,
        "memory_mib": {"first": sizes[0], "last": sizes[-1], "largest": max(sizes)},
        "memory_at_rest_mib": [size >> 20 for _, size in found.at_rest],
        "memory_slope_mib_per_hour": round(found.slope() / 2**20, 2),
        "provenance": provenance(),
    }


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[ServerProcess, list[Path]]]:
    """A server on the demo model, with fewer slots than adapters, and folders of adapters."""
    model = resolve_model("demo")
    shapes = base_shapes(model)
    sources = [folder / f"content-{i}" for i in range(CONTENTS)]
    for i, source in enumerate(sources):
        rank, heads = ((4, 3), (8, 2), (4, 1), (6, 4))[i % 4]
        save_adapter(make_adapter(shapes, TARGETS, rank, heads, seed=i), source)
    # float32: what else is in the batch must not turn the choice between two tokens of nearly the same weight.
    arguments = ["--model", model, "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", "512", "--max-num-seqs", "8", "--slots", "3", "--max-adapters", "5"]
    arguments += ["--max-rank", "8", "--max-heads", "4", "--allow-source", str(folder)]
    arguments += ["--disable-uvicorn-access-log", "--enable-prefix-caching"]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
    with ServerProcess(arguments, folder / "server.log", variables) as process:
        yield process, sources


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--max-slope", type=float, default=30.0, help="MiB an hour (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, help="also write the report there, and beside it the server's log after a fault"
    )
    args = parser.parse_args()
    print("starting the server", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (process, sources):
        assert process.process is not None
        seconds = args.minutes * 60
        found = asyncio.run(soak(process.url, process.process.pid, sources, seconds, args.clients))
        if args.output is not None and (found.wrong or found.server_errors):
            args.output.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder) / "server.log", args.output.with_suffix(".log"))
    text = json.dumps(report(found, seconds), indent=1)
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
    too_steep = found.slope() / 2**20 > args.max_slope
    return 1 if found.wrong or found.server_errors or too_steep else 0


if __name__ == "__main__":
    sys.exit(main())
