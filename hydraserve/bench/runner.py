"""Runs a comparison: starts the servers, warms them up, and drives them in turn, one at a time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydraserve.bench.arms import Comparison, ServerSpec
from hydraserve.bench.cells import choose_cells, turns
from hydraserve.bench.process import HYDRASERVE, NO_KEYS, VLLM, ServerProcess
from hydraserve.bench.result import CellRuns, Result
from hydraserve.bench.stats import Metrics, RequestRecord, Slo, run_metrics
from hydraserve.bench.targets import HttpTarget, ReferenceTarget, Target
from hydraserve.bench.usage import Neighbours, gpu_memory, memory, reset_peak
from hydraserve.bench.workload import Load, Request, Workload
from hydraserve.errors import EngineError

WARMUP_TOKENS = 8
ERRORS_KEPT = 3  # of each run, in the result file
LOADS = "hydraserve_adapter_loads"  # counter of the server: adapters put into host memory or a slot


@dataclass(frozen=True)
class Settings:
    """loads:    concurrencies or rates.
    repeats:  of each cell.
    waves:    closed loop: requests per concurrent client and run.
    requests: open loop: requests per run.
    together: all servers are up at the same time and take turns within each repeat. False: one server after the
              other, for machines that cannot hold them all; arms are then far apart in time.
    log_folder, env: of the servers.
    """

    loads: Sequence[Load]
    log_folder: Path
    repeats: int = 3
    waves: int = 2
    requests: int = 64
    seed: int = 0
    slo: Slo | None = None
    together: bool = True
    env: Mapping[str, str] = field(default_factory=dict)

    def count(self, load: Load) -> int:
        """Requests of one run."""
        return load.concurrency * self.waves if load.concurrency is not None else self.requests


class Progress:
    """What a run tells its watcher; this one is silent."""

    def begin(self, runs: int) -> None:
        """`runs` measured runs are to come."""

    def note(self, text: str) -> None:
        """What happens now."""

    def request_done(self) -> None:
        """One more request was answered."""

    def run_done(self) -> None:
        """One more measured run is over."""


class Runner:
    """Measures all cells of a comparison into `result`, which is whole after every single run.

    on_run: called after each measured run, to save what is there.
    """

    def __init__(
        self,
        comparison: Comparison,
        workload: Workload,
        settings: Settings,
        result: Result,
        progress: Progress | None = None,
        on_run: Callable[[], None] = lambda: None,
    ) -> None:
        self.comparison, self.workload, self.settings, self.result = comparison, workload, settings, result
        self.progress, self.on_run = progress or Progress(), on_run
        self.targets: dict[str, Target] = {}

    def run(self) -> None:
        """Measure everything; sets result.complete at the end. Raises EngineError, and ConfigError before a server is
        started when there is nothing to compare; Ctrl-C comes through."""
        settings = self.settings
        cells, self.result.left_out = choose_cells(
            self.comparison.arms, settings.loads, settings.count, self.workload.popularity
        )
        self.result.cells = cells
        self.progress.begin(len(cells) * self.settings.repeats)
        if self.settings.together:
            with ExitStack() as stack:
                for spec in self.comparison.servers:
                    self.start(spec, stack)
                self.measure(cells)
        else:
            for spec in self.comparison.servers:
                with ExitStack() as stack:
                    self.start(spec, stack)
                    self.measure([cell for cell in cells if cell.arm.server == spec.name])
        self.result.complete = True

    def start(self, spec: ServerSpec, stack: ExitStack) -> None:
        """Start a server (or find it running) and note what it says of itself."""
        self.progress.note(f"starting {spec.name}")
        begin = time.monotonic()
        log = self.settings.log_folder / f"{spec.name}.log"
        target = stack.enter_context(_target(spec, log, self.settings.env))
        self.targets[spec.name] = target
        facts: dict[str, Any] = {
            "kind": spec.kind,
            "arguments": _without_paths(spec.arguments),
            "start_s": round(time.monotonic() - begin, 1),
        }
        if (kv_tokens := target.scrape().kv_tokens) is not None:
            facts["kv_cache_tokens"] = kv_tokens
        if target.leader is not None:
            facts |= {"idle_memory_bytes": memory(target.leader).pss, **engine_facts(log)}
        self.result.servers[spec.name] = facts

    def measure(self, cells: Sequence[CellRuns]) -> None:
        """Warm up every cell, then repeat by repeat all of them in turn, see `turns`."""
        for cell in cells:
            self.progress.note(f"warming up {cell.arm.label}, {cell.load.label}")
            self.warm_up(cell)
        for repeat in range(self.settings.repeats):
            for cell in turns(cells, repeat):
                self.progress.note(f"repeat {repeat + 1}: {cell.arm.label}, {cell.load.label}")
                self.measure_once(cell, self.settings.seed + repeat)
                self.progress.run_done()
                self.on_run()

    def warm_up(self, cell: CellRuns) -> None:
        """Raises EngineError when a request fails: the cell would only measure errors."""
        _refuse_failures(cell, self.drive(cell, self.warmup_requests(cell)))

    def warmup_requests(self, cell: CellRuns) -> list[Request]:
        """As many for every arm under a load: each adapter of the largest once, and the whole concurrency. With prompts
        of no measured run, and short answers."""
        most = max(len(other.arm.models) for other in self.result.cells if other.load == cell.load)
        count = max(most, cell.load.concurrency or 1)
        workload = replace(self.workload, popularity="distinct")
        requests = workload.requests(count, cell.arm.models, cell.load, self.settings.seed + self.settings.repeats)
        return [replace(r, at=0.0, output_tokens=min(r.output_tokens, WARMUP_TOKENS)) for r in requests]

    def measure_once(self, cell: CellRuns, seed: int) -> None:
        """One run of a cell, added to its runs.

        A server that stood idle while others were measured answers its first requests more slowly (on two cores the
        first tokens took twice as long), so it is woken before each run.
        """
        target = self.targets[cell.arm.server]
        self.warm_up(cell)
        requests = self.workload.requests(self.settings.count(cell.load), cell.arm.models, cell.load, seed)
        before = target.scrape()
        if target.leader is not None:
            reset_peak(target.leader)
        neighbours = Neighbours(target.leader) if target.leader else None
        records = self.drive(cell, requests)
        metrics = run_metrics(records, self.settings.slo)
        metrics["other_processes_cpu_share"] = neighbours.share() if neighbours else None
        metrics |= _memory_metrics(target)
        after = target.scrape()
        counters = after.since(before)
        if LOADS in after.counters:
            metrics["adapter_loads"] = counters.get(LOADS, 0.0)
        errors = [record.error for record in records if record.error is not None]
        cell.add(metrics, counters, errors[:ERRORS_KEPT])

    def drive(self, cell: CellRuns, requests: Sequence[Request]) -> list[RequestRecord]:
        return self.targets[cell.arm.server].run(requests, cell.load, self.progress.request_done)


def engine_facts(log: Path) -> dict[str, str]:
    """What vLLM's log says of how the model is compiled ("NONE", "DYNAMO_TRACE_ONCE", ...) and, on a CPU, of the cores
    that its threads are bound to; nothing where it does not say."""
    text = log.read_text(errors="replace")
    patterns = {"compilation": r"'mode': <CompilationMode\.(\w+)", "engine_cores": r"core ids=\[([\d, ]+)\]"}
    found = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    return {name: match[1] for name, match in found.items() if match}


def _target(spec: ServerSpec, log: Path, env: Mapping[str, str]) -> AbstractContextManager[Target]:
    if spec.kind == "reference":
        return ReferenceTarget(spec.arguments, spec.adapters, log, env)
    return _http_target(spec, log, env)


@contextmanager
def _http_target(spec: ServerSpec, log: Path, env: Mapping[str, str]) -> Iterator[Target]:
    if spec.url is not None:
        yield HttpTarget(spec.url, None, spec.key)
        return
    ours = spec.kind == "hydraserve"
    env = {**env, **NO_KEYS, "HYDRASERVE_PLUGIN": "1" if ours else "0", "VLLM_NO_USAGE_STATS": "1"}
    with ServerProcess(spec.arguments, log, env, command=HYDRASERVE if ours else VLLM) as server:
        assert server.process is not None
        yield HttpTarget(server.url, server.process.pid)


def _memory_metrics(target: Target) -> Metrics:
    if target.leader is None:
        return {}
    now, gpu = memory(target.leader), gpu_memory(target.leader)
    metrics: Metrics = {"memory_pss_bytes": float(now.pss), "run_peak_bytes": float(now.peak)}
    return metrics if gpu is None else metrics | {"gpu_memory_bytes": float(gpu)}


def _refuse_failures(cell: CellRuns, records: Sequence[RequestRecord]) -> None:
    errors = [record.error for record in records if record.error is not None]
    if errors:
        raise EngineError(
            what=f"{cell.arm.label}, {cell.load.label}: {len(errors)} of {len(records)} warm-up requests",
            got=errors[0],
            expected="answers",
            fix="see the server's log in the folder that --logs names",
        )


def _without_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments as published: of local paths only the last component."""

    def shorten(text: str) -> str:
        return re.sub(r'(?<![\w.:/])(?:/[^/\s",=]+)+/([^/\s",=]+)', r"\1", text)

    return [shorten(argument) for argument in arguments]
