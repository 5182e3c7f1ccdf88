"""What is compared with what: the servers that a comparison needs, and the arms that drive them.

An *arm* is one kind of traffic to one server. Every server gets the same engine flags; they differ in nothing but
how adapters are computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hydraserve.adapters.sizing import check_targets
from hydraserve.adapters.synthetic import make_adapter, save_adapter
from hydraserve.errors import ConfigError

BASE = "base"  # what the base model is called in requests

# In the order of the table. `off` is what all others are divided by; `control` is a second server just like it: what it
# differs by is how far two equal servers differ.
KINDS = ("off", "control", "base-only", "hydra", "lora", "lora-wide", "reference")
BASELINE = "off"

# Numbers of different adapters, when nobody says which.
DEFAULT_COUNTS = (1, 8)

# transformers computes every request of a batch in lockstep and one adapter at a time; larger batches only take long.
REFERENCE_LARGEST_BATCH = 8

ServerKind = Literal["vllm", "hydraserve", "reference", "running"]


@dataclass(frozen=True)
class ServerSpec:
    """A server to start, or one that runs already.

    kind:      "vllm": vLLM's own, nothing of ours in it; "hydraserve"; "reference": the authors' computation in
               transformers; "running": at `url`, started by somebody else.
    arguments: of that server, without the address.
    adapters:  name -> folder.
    key:       what a running server asks for.
    """

    name: str
    kind: ServerKind
    arguments: tuple[str, ...] = ()
    adapters: Mapping[str, Path] = field(default_factory=dict)
    url: str | None = None
    key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Arm:
    """name: unique; label: for people; models: the names that requests are spread over; adapters: how many of them
    are adapters; kind: one of KINDS; shape: "r8 E4", empty for the base."""

    name: str
    label: str
    kind: str
    server: str
    models: tuple[str, ...]
    adapters: int
    shape: str = ""


@dataclass(frozen=True)
class Comparison:
    """The servers and the arms, in the order in which they take turns. baseline: the arm all others are divided by."""

    servers: tuple[ServerSpec, ...]
    arms: tuple[Arm, ...]
    baseline: str | None


@dataclass(frozen=True)
class Shape:
    """rank r, heads E; folders: given adapters of that shape, by name; empty: random ones are made."""

    rank: int
    heads: int
    folders: Mapping[str, Path] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"r{self.rank} E{self.heads}"


@dataclass(frozen=True)
class Plan:
    """What a comparison is made from.

    model:        path or Hub id of the base; its linear layers are in base_shapes: path -> (in, out).
    shapes:       of the HydraLoRA adapters.
    counts:       numbers of different adapters, ascending.
    targets:      last name components of the adapted layers; None: all but lm_head.
    kinds:        which of KINDS to measure.
    engine_flags: of vLLM, for every server.
    slots:        adapters that fit into one batch; None: as many as there are.
    vllm_rank:    rank -> the value that vLLM's --max-lora-rank takes for it.
    folder:       where random adapters are written.
    dtype:        what --dtype in engine_flags says; the reference computes in it too.
    """

    model: str
    base_shapes: Mapping[str, tuple[int, int]]
    shapes: Sequence[Shape]
    counts: Sequence[int]
    kinds: Sequence[str]
    engine_flags: Sequence[str]
    vllm_rank: Callable[[int], int]
    folder: Path
    targets: Sequence[str] | None = None
    slots: int | None = None
    dtype: str = "auto"

    @property
    def wrapped(self) -> tuple[str, ...]:
        """The adapted layers' names, sorted."""
        names = {path.rpartition(".")[2] for path in self.base_shapes} - {"lm_head"}
        return tuple(sorted(names if self.targets is None else names & set(self.targets)))

    @property
    def most(self) -> int:
        """The largest number of adapters."""
        return max(self.counts)


def adapter_counts(asked: Sequence[int] | None, there: int | None) -> list[int]:
    """How many different adapters the arms have, ascending.

    asked: None: nobody said. there: how many adapters there are; None: as many as are wanted, as they are random.

    Raises ConfigError when more are asked for than there are.
    """
    if asked is None:
        if there is None:
            return list(DEFAULT_COUNTS)
        return sorted({*(count for count in DEFAULT_COUNTS if count <= there), *([there] if there else [])})
    if there is not None and max(asked) > there:
        raise ConfigError(
            what="--adapters",
            got=max(asked),
            expected=f"no more than the {there} adapter{'s' * (there != 1)} that there {'are' if there != 1 else 'is'}",
            fix="name or load more adapters, or leave --adapters out",
        )
    return sorted(set(asked))


def compare(plan: Plan) -> Comparison:
    """All servers and arms of a plan. Random adapters are written below plan.folder.

    Raises ConfigError when the base has no layers of plan.targets.
    """
    check_targets(plan.targets or (), plan.base_shapes)
    common = ("--model", plan.model, "--served-model-name", BASE, *plan.engine_flags)
    servers: list[ServerSpec] = []
    arms: list[Arm] = []
    if "off" in plan.kinds:
        servers.append(ServerSpec("off", "vllm", common))
        arms.append(Arm("off", "LoRA off", "off", "off", (BASE,), 0))
    if "control" in plan.kinds:
        servers.append(ServerSpec("control", "vllm", common))
        arms.append(Arm("control", "LoRA off, another server", "control", "control", (BASE,), 0))
    if {"base-only", "hydra"} & set(plan.kinds):
        for i, shape in enumerate(plan.shapes):
            server = _hydra_server(plan, shape, common)
            servers.append(server)
            if "base-only" in plan.kinds and i == 0:
                arms.append(Arm("base-only", "adapters on, base only", "base-only", server.name, (BASE,), 0))
            if "hydra" in plan.kinds:
                arms += _adapter_arms("hydra", "HydraLoRA", server, plan.counts, shape.label)
    for kind, rank in _plain_ranks(plan):
        server = _vllm_lora_server(plan, rank, common)
        servers.append(server)
        arms += _adapter_arms(kind, "vLLM LoRA", server, plan.counts, f"r{rank}")
    if "reference" in plan.kinds:
        shape = plan.shapes[0]
        adapters = shape.folders or _random_adapters(plan, shape.rank, shape.heads)
        server = ServerSpec("reference", "reference", ("--model", plan.model, "--dtype", plan.dtype), adapters)
        servers.append(server)
        arms += _adapter_arms("reference", "per-head in transformers", server, plan.counts, shape.label)
    return Comparison(tuple(servers), tuple(arms), BASELINE if "off" in plan.kinds else None)


def running_server(
    url: str, base: str, adapters: Sequence[str], counts: Sequence[int], key: str | None = None
) -> Comparison:
    """Arms for a server that runs already: its base model, and its adapters if it has any."""
    server = ServerSpec("running", "running", (), dict.fromkeys(adapters, Path()), url, key)
    arms = [Arm("base-only", "base only", "base-only", server.name, (base,), 0)]
    arms += _adapter_arms("hydra", "adapters", server, counts, "")
    return Comparison((server,), tuple(arms), "base-only")


def _adapter_arms(kind: str, title: str, server: ServerSpec, counts: Sequence[int], shape: str) -> list[Arm]:
    """One arm for each number of adapters."""
    names = tuple(server.adapters)
    return [
        Arm(
            name="-".join([server.name, str(count)]),
            label=f"{title} {shape}".strip() + f", {count} adapter" + "s" * (count > 1),
            kind=kind,
            server=server.name,
            models=names[:count],
            adapters=count,
            shape=shape,
        )
        for count in counts
    ]


def _plain_ranks(plan: Plan) -> list[tuple[str, int]]:
    """(kind, rank) of the plain LoRA servers: rank r, and rank E*r, which has as many parameters."""
    ranks: dict[int, str] = {}
    for shape in plan.shapes:
        if "lora" in plan.kinds:
            ranks.setdefault(shape.rank, "lora")
        if "lora-wide" in plan.kinds:
            ranks.setdefault(shape.rank * shape.heads, "lora-wide")
    return [(kind, rank) for rank, kind in ranks.items()]


def _hydra_server(plan: Plan, shape: Shape, common: Sequence[str]) -> ServerSpec:
    adapters = shape.folders or _random_adapters(plan, shape.rank, shape.heads)
    arguments = [*common, "--slots", str(plan.slots or len(adapters))]
    for name, path in adapters.items():
        arguments += ["--adapter", f"{name}={path}"]
    return ServerSpec(f"hydra-r{shape.rank}-e{shape.heads}", "hydraserve", tuple(arguments), adapters)


def _vllm_lora_server(plan: Plan, rank: int, common: Sequence[str]) -> ServerSpec:
    adapters = _random_adapters(plan, rank, 1)
    slots = plan.slots or len(adapters)
    modules = [json.dumps({"name": name, "path": str(path)}) for name, path in adapters.items()]
    arguments = [
        *common,
        "--enable-lora",
        *("--max-loras", str(slots)),
        *("--max-cpu-loras", str(max(slots, len(adapters)))),
        *("--max-lora-rank", str(plan.vllm_rank(rank))),
        *("--lora-target-modules", *plan.wrapped),
        *("--lora-modules", *modules),
    ]
    return ServerSpec(f"lora-r{rank}", "vllm", tuple(arguments), adapters)


def _random_adapters(plan: Plan, rank: int, heads: int) -> dict[str, Path]:
    """plan.most adapters, plain LoRA for one head; made once for each shape."""
    import torch

    adapters = {f"a{seed}": plan.folder / f"r{rank}-e{heads}" / f"a{seed}" for seed in range(plan.most)}
    for seed, path in enumerate(adapters.values()):
        if not path.exists():
            made = make_adapter(plan.base_shapes, plan.wrapped, rank, heads, seed, dtype=torch.bfloat16)
            save_adapter(made, path)
    return adapters
