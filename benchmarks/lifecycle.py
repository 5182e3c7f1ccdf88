"""What coming and going adapters cost those that are served: writes benchmarks/results/lifecycle_*.json.

    python benchmarks/lifecycle.py prepare FOLDER
    python benchmarks/lifecycle.py stall|fairness|first_token|unload|many FOLDER

`prepare` writes the adapters, which takes longer than some of the measurements; each measurement then starts a server
of its own. See docs/operations.md for what is promised.

    stall        p99 time between tokens of running streams, while adapters of 50 MB load, over the quiet figure
    fairness     16 adapters on 8 slots: the longest wait for a first token over the mean
    first_token  time to first token of an adapter in host memory over that of one in a slot
    unload       resident memory and KV blocks after adapters were loaded, used and removed
    many         1000 adapters registered, Zipf traffic: throughput over that of 8 on the same slots; start and memory
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx
import psutil

from hydraserve.adapters.ingest import yield_to_others
from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.bench.client import drive
from hydraserve.bench.machine import environment, provenance
from hydraserve.bench.process import ServerProcess
from hydraserve.bench.result import save
from hydraserve.bench.stats import RequestRecord
from hydraserve.bench.workload import Load, Request, assign_models
from hydraserve.models import base_shapes, resolve_model

RESULTS = Path(__file__).resolve().parent / "results"
SLOTS, HOST = 8, 24
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = {"targets": TARGETS, "rank": 8, "heads": 4}
LARGE = {"targets": TARGETS, "rank": 16, "heads": 8}  # 47 MB in bfloat16
TINY = {"targets": ("q_proj",), "rank": 4, "heads": 2}
COUNTS = {"small": 16, "large": 6, "tiny": 1000}
PROMPT_TOKENS = 32


def prepare(folder: Path, base: str) -> None:
    """Write the adapters of all measurements."""
    import torch

    shapes = base_shapes(base)
    for kind, sizes in (("small", SMALL), ("large", LARGE), ("tiny", TINY)):
        for seed in range(COUNTS[kind]):
            path = folder / kind / f"{kind}-{seed:04d}"
            if not path.exists():
                save_adapter(make_adapter(shapes, seed=seed, dtype=torch.bfloat16, **sizes), path)  # type: ignore[arg-type]


class Server:
    """A server with room for SLOTS adapters in a batch and HOST in memory; `http` talks to it."""

    def __init__(self, base: str, folder: Path, *arguments: str) -> None:
        options = ["--model", base, "--served-model-name", "base", "--max-model-len", "1024", "--max-num-seqs", "16"]
        options += ["--no-enable-prefix-caching", "--slots", str(SLOTS), "--max-adapters", str(HOST)]
        options += ["--max-rank", "16", "--max-heads", "8", "--allow-source", str(folder)]
        options += ["--disable-uvicorn-access-log", *arguments]
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "HYDRASERVE_CACHE": str(folder / "cache")}
        self.process = ServerProcess(options, folder / "server.log", env)
        self.started_s = 0.0

    def __enter__(self) -> Server:
        begun = time.monotonic()
        self.process.start()
        self.started_s = time.monotonic() - begun
        self.http = httpx.Client(base_url=self.process.url, timeout=300)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.process.stop()

    def add(self, name: str, source: Path) -> dict[str, Any]:
        answer = self.http.post("/v1/adapters", json={"name": name, "source": str(source)})
        return dict(answer.raise_for_status().json())

    def remove(self, name: str) -> None:
        self.http.delete(f"/v1/adapters/{name}").raise_for_status()

    def residency(self) -> dict[str, Any]:
        return dict(self.http.get("/v1/adapters").raise_for_status().json()["residency"])

    def resident(self) -> int:
        """Bytes that belong to the server's processes alone."""
        assert self.process.process is not None
        root = psutil.Process(self.process.process.pid)
        return sum(process.memory_full_info().uss for process in [root, *root.children(recursive=True)])

    def run(self, models: Sequence[str], output_tokens: int, concurrency: int) -> list[RequestRecord]:
        """A request for each name, `concurrency` at a time. Raises RuntimeError when one fails."""
        requests = [Request(model, prompt(i), output_tokens) for i, model in enumerate(models)]
        records = drive(self.process.url, requests, Load(concurrency=concurrency))
        failed = [record.error for record in records if record.error]
        if failed:
            raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
        return records


def prompt(seed: int) -> tuple[int, ...]:
    return tuple((31 * seed + 17 * i) % 5000 + 100 for i in range(PROMPT_TOKENS))


def quantile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def measure_stall(base: str, folder: Path) -> dict[str, Any]:
    """Four streams; three phases take turns: quiet; a program that has nothing to do with the server spins at the
    reader's priority, which is what any work at all beside the model costs on this machine; adapters load."""
    with Server(base, folder) as server:
        names = [f"small-{i:04d}" for i in range(4)]
        for name in names:
            server.add(name, folder / "small" / name)
        server.run(names, 32, 4)
        phases: dict[str, list[list[float]]] = {"quiet": [], "spinning": [], "loading": []}
        loads: list[float] = []
        beside: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "quiet": nullcontext,
            "spinning": spinning,
            "loading": partial(loading, server, folder, loads),
        }
        for _ in range(8):
            for phase, rounds in phases.items():
                with beside[phase]():
                    rounds.append([gap for record in server.run(names * 2, 200, 4) for gap in record.gaps()])
        size = (folder / "large" / "large-0000" / "adapter_model.bin").stat().st_size
    values = {phase: summary([gap for gaps in rounds for gap in gaps]) for phase, rounds in phases.items()}
    p99 = {phase: [quantile(gaps, 99) for gaps in rounds] for phase, rounds in phases.items()}
    ratios = {
        f"{phase}_over_{other}": {
            "p99": values[phase]["p99_ms"] / values[other]["p99_ms"],
            "by_round": sorted(a / b for a, b in zip(p99[phase], p99[other], strict=True)),
        }
        for phase, other in (("loading", "quiet"), ("spinning", "quiet"), ("loading", "spinning"))
    }
    about = {"loads": len(loads), "bytes": size, "median_load_s": statistics.median(loads)}
    met = values["loading"]["p99_ms"] <= 1.5 * values["quiet"]["p99_ms"]
    return {**values, **about, **ratios, "target": 1.5, "met": met}


def summary(gaps: Sequence[float]) -> dict[str, float]:
    return {f"p{p}_ms": 1000 * quantile(gaps, p) for p in (50, 90, 99)} | {"max_ms": 1000 * max(gaps)}


@contextmanager
def spinning() -> Iterator[None]:
    context = get_context("spawn")
    ready = context.Event()
    process = context.Process(target=spin, args=(ready,), daemon=True)
    process.start()
    try:
        ready.wait()
        yield
    finally:
        process.kill()
        process.join()


def spin(ready: Event) -> None:
    yield_to_others()
    ready.set()
    while True:
        pass


@contextmanager
def loading(server: Server, folder: Path, seconds: list[float]) -> Iterator[None]:
    """Large adapters are loaded and removed, one after the other. seconds: takes how long each load took."""
    stop = threading.Event()
    loader = threading.Thread(target=load_and_remove, args=(server, folder, stop, seconds))
    loader.start()
    try:
        yield
    finally:
        stop.set()
        loader.join()


def load_and_remove(server: Server, folder: Path, stop: threading.Event, seconds: list[float]) -> None:
    for i in range(10_000):
        if stop.is_set():
            return
        name = f"large-{i % COUNTS['large']:04d}"
        begun = time.monotonic()
        server.add(name, folder / "large" / name)
        seconds.append(time.monotonic() - begun)
        server.remove(name)


def measure_fairness(base: str, folder: Path) -> dict[str, Any]:
    """Twice as many adapters as slots, all asked without a pause; then half of them asked three times as much."""
    names = [f"small-{i:04d}" for i in range(2 * SLOTS)]
    result: dict[str, Any] = {"adapters": len(names), "slots": SLOTS}
    with Server(base, folder) as server:
        for name in names:
            server.add(name, folder / "small" / name)
        server.run(names, 8, 8)
        for load, hot in (("even", 1), ("half_three_times", 3)):
            clients = [name for i, name in enumerate(names) for _ in range(hot if i < SLOTS else 1)]
            waits = asyncio.run(wait_times(server.process.url, clients, seconds=60.0))
            everything = [wait for times in waits.values() for wait in times]
            mean, longest = statistics.mean(everything), max(everything)
            served = sorted(len(times) for times in waits.values())
            figures = {"requests": len(everything), "mean_s": mean, "max_s": longest, "max_over_mean": longest / mean}
            result[load] = {**figures, "fewest_by_adapter": served[0], "most_by_adapter": served[-1]}
    worst = max(result[load]["max_over_mean"] for load in ("even", "half_three_times"))
    return {**result, "target": 4.0, "met": worst <= 4.0}


async def wait_times(url: str, clients: Sequence[str], seconds: float) -> dict[str, list[float]]:
    """Times to first token by adapter, of clients that each ask again as soon as they are answered."""
    waits: dict[str, list[float]] = {name: [] for name in clients}
    end = time.monotonic() + seconds

    async def ask(http: httpx.AsyncClient, name: str, seed: int) -> None:
        body = {"model": name, "prompt": list(prompt(seed)), "max_tokens": 8, "stream": True, "ignore_eos": True}
        while time.monotonic() < end:
            begun = time.monotonic()
            async with http.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                chunks = response.aiter_bytes()
                await anext(chunks)
                waits[name].append(time.monotonic() - begun)
                async for _ in chunks:
                    pass

    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as http:
        await asyncio.gather(*(ask(http, name, seed) for seed, name in enumerate(clients)))
    return waits


def measure_first_token(base: str, folder: Path) -> dict[str, Any]:
    """One request at a time: for the adapter of the request before, and for one that has left its slot since."""
    names = [f"small-{i:04d}" for i in range(2 * SLOTS)]
    slot, host = [], []
    with Server(base, folder) as server:
        for name in names:
            server.add(name, folder / "small" / name)
        server.run(names * 2, 4, 1)
        for _ in range(4):
            for name in names:  # it has left its slot since it was last asked for; for the second request it is in one
                first, second = server.run([name, name], 4, 1)
                host.append(first.ttft)
                slot.append(second.ttft)
    ratio = statistics.median(host) / statistics.median(slot)
    figures = {
        f"{where}_{p}_ms": 1000 * quantile(times, n)
        for where, times in (("slot", slot), ("host", host))
        for p, n in (("p50", 50), ("p90", 90))
    }
    return {"requests": len(host), **figures, "ratio_of_medians": ratio, "target": 1.5, "met": ratio <= 1.5}


def measure_unload(base: str, folder: Path) -> dict[str, Any]:
    """Rounds of loading, using and removing; the first one is what the server needs once."""
    names = [f"large-{i:04d}" for i in range(COUNTS["large"])]
    after, used = [], []
    with Server(base, folder) as server:
        server.run(["base"] * 4, 16, 4)
        empty = {**server.residency(), "resident": server.resident()}
        for _ in range(4):
            for name in names:
                server.add(name, folder / "large" / name)
            server.run(names, 16, 4)
            used.append(server.resident())
            for name in names:
                server.remove(name)
            after.append({**server.residency(), "resident": server.resident()})
    nbytes = len(names) * (folder / "large" / names[0] / "adapter_model.bin").stat().st_size
    books = all(one[key] == empty[key] for one in after for key in ("slots", "host_bytes", "kv_blocks_free"))
    growth = after[-1]["resident"] - after[0]["resident"]
    mib = {"before": empty["resident"], "in_use": used, "after": [one["resident"] for one in after]}
    figures = {key: [v >> 20 for v in value] if isinstance(value, list) else value >> 20 for key, value in mib.items()}
    met = books and growth < 0.05 * nbytes
    return {
        "adapters": len(names),
        "adapter_bytes": nbytes,
        "resident_mib": figures,
        "slots_host_and_blocks_as_before": books,
        "growth_over_rounds_bytes": growth,
        "target": 0.05 * nbytes,
        "met": met,
    }


def measure_many(base: str, folder: Path) -> dict[str, Any]:
    """The same requests for 8 of 1000 adapters, and for all 1000 by Zipf's law; both orders, in one server."""
    names = [f"tiny-{i:04d}" for i in range(COUNTS["tiny"])]
    zipf = assign_models("zipf", 400, names, 1)
    few = assign_models("zipf", 400, names[:SLOTS], 2)
    with Server(base, folder) as server:
        start_few = server.started_s
    with Server(base, folder, "--adapter-dir", str(folder / "tiny")) as server:
        start_many, listed = server.started_s, server.http.get("/v1/adapters").json()
        read_at_start = sum(card["version"] is not None for card in listed["data"])
        memory = [server.resident()]
        server.run(few, 16, SLOTS)
        first = throughput(server.run(zipf, 16, SLOTS))  # reads each adapter from disk when it is asked for first
        memory.append(server.resident())
        few_rates, zipf_rates = [], []
        for _ in range(3):
            few_rates.append(throughput(server.run(few, 16, SLOTS)))
            zipf_rates.append(throughput(server.run(zipf, 16, SLOTS)))
        memory.append(server.resident())
        held = server.residency()["host_adapters"]
    ratio = statistics.median(zipf_rates) / statistics.median(few_rates)
    return {
        "adapters": len(names),
        "asked_for": len(set(zipf)),
        "start_s": {"without_adapters": start_few, "with_1000": start_many},
        "read_at_start": read_at_start,
        "tokens_per_s": {"8_adapters": few_rates, "1000_adapters": zipf_rates, "1000_adapters_first_time": first},
        "resident_mib": [value >> 20 for value in memory],
        "host_adapters": held,
        "host_capacity": HOST,
        "ratio": ratio,
        "target": 0.9,
        "met": ratio >= 0.9 and read_at_start == 0 and held <= HOST,
    }


def throughput(records: Sequence[RequestRecord]) -> float:
    """Output tokens a second."""
    begun, end = min(record.start for record in records), max(record.end for record in records)
    return sum(record.output_tokens for record in records) / (end - begun)


MEASUREMENTS: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "stall": measure_stall,
    "fairness": measure_fairness,
    "first_token": measure_first_token,
    "unload": measure_unload,
    "many": measure_many,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help=f"prepare, or of {', '.join(MEASUREMENTS)}; the last one is the folder")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    *actions, last = args.what
    folder, base = Path(last).resolve(), resolve_model(args.model)
    for action in actions:
        if action == "prepare":
            prepare(folder, base)
            continue
        result = MEASUREMENTS[action](base, folder)
        about = {"kind": f"lifecycle: {action}", "provenance": provenance(), "environment": environment()}
        setting = {"model": args.model, "slots": SLOTS, "host_adapters": HOST, "prompt_tokens": PROMPT_TOKENS}
        save({**about, **setting, "result": result}, args.output / f"lifecycle_{action}.json")
        print(action, json.dumps(result, indent=1))
        shutil.rmtree(folder / "cache", ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
