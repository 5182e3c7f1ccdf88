"""From the adapters that a server starts with to the size of its slots."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra_kernels import Layout, SlotCapacity

from hydraserve.adapters.checkpoint import AdapterSummary, inspect_adapter
from hydraserve.config import DEFAULT_MAX_HEADS, DEFAULT_MAX_RANK, DEFAULT_SLOTS, ServeConfig
from hydraserve.errors import AdapterError, ConfigError


@dataclass(frozen=True)
class SlotPlan:
    """slots: adapters in one batch; max_adapters: in host memory; targets: last name components of the layers to
    wrap; max_rank: the largest rank of any layer; slot_bytes: memory of one slot at full capacity."""

    slots: int
    max_adapters: int
    capacity: SlotCapacity
    max_rank: int
    targets: tuple[str, ...]
    slot_bytes: int


def readable_adapters(directory: Path) -> list[AdapterSummary]:
    """The adapters below a folder. Only their headers are read; what cannot be is left to the server, which says why.

    Raises ConfigError when there is no such folder.
    """
    if not directory.is_dir():
        raise ConfigError(what="--adapter-dir", got=str(directory), expected="a folder", fix="make it")
    found = []
    for path in sorted(path for path in directory.iterdir() if not path.name.startswith(".")):
        with contextlib.suppress(AdapterError):
            found.append(inspect_adapter(path))
    return found


def plan_slots(
    config: ServeConfig,
    adapters: Sequence[AdapterSummary],
    base_shapes: Mapping[str, tuple[int, int]],
    dtype_bytes: int,
    later: Sequence[AdapterSummary] = (),
) -> SlotPlan:
    """Size the slots for the given adapters, and for those that come later: what --adapter-dir holds (and others of the
    usual size), and those that the flags leave room for.

    base_shapes: module path -> (in, out) of every linear layer of the base.

    Raises ConfigError when a flag is too small for a given adapter or names a module that the base does not have.
    """
    expected = (*adapters, *later)
    room = _room(config, adapters)
    capacity = _largest([_capacity_of(layout) for layout in room] + [adapter.capacity for adapter in expected])
    wanted = DEFAULT_SLOTS if config.adapter_dir else max(len(adapters), config.max_adapters or 0)
    slots = config.slots or max(1, min(wanted, DEFAULT_SLOTS))
    max_adapters = config.max_adapters or max(slots, len(adapters))
    if max_adapters < max(slots, len(adapters)):
        raise ConfigError(
            what="--max-adapters",
            got=str(max_adapters),
            expected=f"at least {max(slots, len(adapters))}: the adapters given, and the slots",
            fix="raise --max-adapters or lower --slots",
        )
    targets = _targets(config, adapters, later, base_shapes)
    wrapped = [shape for name, shape in base_shapes.items() if name.rsplit(".", 1)[-1] in targets]
    numbers = sum(capacity.rows * n_in + capacity.k * out for n_in, out in wrapped)
    max_rank = max([layout.rank for layout in room] + [adapter.rank for adapter in expected])
    return SlotPlan(slots, max_adapters, capacity, max_rank, targets, numbers * dtype_bytes)


def _room(config: ServeConfig, adapters: Sequence[AdapterSummary]) -> list[Layout]:
    """The largest layer that flags ask room for. None of them when there are adapters, whose own sizes then say enough.

    Raises ConfigError for a flag that is smaller than an adapter.
    """
    sizes = []
    for flag, asked, given, default in (
        ("--max-rank", config.max_rank, [a.rank for a in adapters], DEFAULT_MAX_RANK),
        ("--max-heads", config.max_heads, [a.heads for a in adapters], DEFAULT_MAX_HEADS),
    ):
        need = max(given, default=0)
        if asked is not None and asked < need:
            raise ConfigError(
                what=flag,
                got=str(asked),
                expected=f"at least {need}, which a given adapter has",
                fix=f"{flag} {need}, or leave that adapter out",
            )
        sizes.append(asked or need or default)
    asked_for = config.max_rank or config.max_heads or config.per_head_a
    if not asked_for and config.adapter_dir:
        sizes = [DEFAULT_MAX_RANK, DEFAULT_MAX_HEADS]
    elif not asked_for and adapters:
        return []
    rank, heads = sizes
    return [Layout(rank, heads, shared_a=not config.per_head_a, has_router=True)]


def _capacity_of(layout: Layout) -> SlotCapacity:
    return SlotCapacity(rows=layout.z_rows, k=layout.k, heads=layout.heads)


def _largest(capacities: Sequence[SlotCapacity]) -> SlotCapacity:
    """The smallest slot that takes what each of these takes."""
    return SlotCapacity(*(max(getattr(each, field) for each in capacities) for field in ("rows", "k", "heads")))


def _targets(
    config: ServeConfig,
    adapters: Iterable[AdapterSummary],
    later: Iterable[AdapterSummary],
    base_shapes: Mapping[str, tuple[int, int]],
) -> tuple[str, ...]:
    known = {name.rsplit(".", 1)[-1] for name in base_shapes if "lm_head" not in name}
    used = {target for adapter in adapters for target in adapter.targets}
    used |= {target for adapter in later for target in adapter.targets} & known  # one for another base may be there
    if config.target_modules is None:
        return tuple(sorted(used or known))
    check_targets(config.target_modules, base_shapes)
    return tuple(sorted(used | set(config.target_modules)))


def check_targets(targets: Iterable[str], base_shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises ConfigError when the base has no linear layer of one of these names."""
    known = {name.rsplit(".", 1)[-1] for name in base_shapes if "lm_head" not in name}
    if unknown := set(targets) - known:
        raise ConfigError(
            what="--target-modules",
            got=", ".join(sorted(unknown)),
            expected=f"linear layers of the base model: {', '.join(sorted(known))}",
            fix="name layers by the last part of their path",
        )
