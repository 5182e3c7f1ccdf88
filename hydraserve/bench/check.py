"""Whether a memory plan is what the engine really takes: start the server as planned, fill its slots, look."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydraserve.adapters.synthetic import make_adapter, save_adapter
from hydraserve.bench.arms import BASE
from hydraserve.bench.capacity import MemoryPlan
from hydraserve.bench.client import drive
from hydraserve.bench.process import NO_KEYS, ServerProcess
from hydraserve.bench.scrape import scrape
from hydraserve.bench.usage import memory
from hydraserve.bench.workload import Lengths, Load, Workload
from hydraserve.errors import EngineError

# Planned and found may differ by this much.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Checked:
    """One number of a plan, and what was found."""

    name: str
    planned: int
    found: int

    @property
    def difference(self) -> float:
        """Of what was found, relative to the plan."""
        return self.found / self.planned - 1

    @property
    def agrees(self) -> bool:
        return abs(self.found - self.planned) <= TOLERANCE * self.planned


def check_plan(model: str, plan: MemoryPlan, folder: Path) -> list[Checked]:
    """KV tokens, and on a CPU the memory of all processes with as many random adapters loaded as there are slots.

    The adapters that only wait are not made: a plan for thousands can be checked in a minute.

    Raises EngineError when the server does not come up or refuses an adapter.
    """
    import torch

    adapters = {f"a{seed}": folder / f"a{seed}" for seed in range(plan.slots)}
    layout = plan.wish.layout
    for seed, path in enumerate(adapters.values()):
        adapter = make_adapter(plan.shapes, None, layout.rank, layout.heads, seed, dtype=torch.bfloat16)
        save_adapter(adapter, path)
    arguments = ["--model", model, "--served-model-name", BASE, *plan.flags()]
    for name, path in adapters.items():
        arguments += ["--adapter", f"{name}={path}"]
    with ServerProcess(arguments, folder / "server.log", NO_KEYS) as server:
        requests = Workload(100, Lengths(8, 8), Lengths(4, 4)).requests(
            len(adapters), list(adapters), Load(concurrency=len(adapters)), seed=0
        )
        errors = [r.error for r in drive(server.url, requests, Load(concurrency=len(adapters))) if r.error is not None]
        if errors:
            raise EngineError("a request to the planned server", errors[0], "an answer", f"see {server.log}")
        found = [Checked("KV tokens", plan.kv_tokens, scrape(server.url).kv_tokens or 0)]
        if plan.wish.device == "cpu":
            assert server.process is not None
            waiting = (plan.max_adapters - len(adapters)) * plan.adapter
            found.append(Checked("memory in bytes", plan.total - waiting, memory(server.process.pid).pss))
    return found
