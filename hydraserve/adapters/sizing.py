"""From the adapters that a server starts with to the size of its slots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hydra_kernels import SlotCapacity

from hydraserve.adapters.checkpoint import AdapterSummary
from hydraserve.config import DEFAULT_MAX_HEADS, DEFAULT_MAX_RANK, DEFAULT_SLOTS, ServeConfig
from hydraserve.errors import ConfigError


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


def plan_slots(
    config: ServeConfig,
    adapters: Sequence[AdapterSummary],
    base_shapes: Mapping[str, tuple[int, int]],
    dtype_bytes: int,
) -> SlotPlan:
    """Size the slots for the given adapters, and for those that the flags leave room for.

    base_shapes: module path -> (in, out) of every linear layer of the base.

    Raises ConfigError when a flag is too small for a given adapter or names a module that the base does not have.
    """
    max_rank, max_heads = _limits(config, adapters)
    room = SlotCapacity(rows=max_rank + max_heads, k=max_rank * max_heads, heads=max_heads)
    needed = [room, *(a.capacity for a in adapters)]
    capacity = SlotCapacity(*(max(getattr(c, f) for c in needed) for f in ("rows", "k", "heads")))
    slots = config.slots or max(1, min(max(len(adapters), config.max_adapters or 0), DEFAULT_SLOTS))
    max_adapters = config.max_adapters or max(slots, len(adapters))
    if max_adapters < max(slots, len(adapters)):
        raise ConfigError(
            what="--max-adapters",
            got=str(max_adapters),
            expected=f"at least {max(slots, len(adapters))}: the adapters given, and the slots",
            fix="raise --max-adapters or lower --slots",
        )
    targets = _targets(config, adapters, base_shapes)
    wrapped = [shape for name, shape in base_shapes.items() if name.rsplit(".", 1)[-1] in targets]
    numbers = sum(capacity.rows * n_in + capacity.k * out for n_in, out in wrapped)
    return SlotPlan(slots, max_adapters, capacity, max_rank, targets, numbers * dtype_bytes)


def _limits(config: ServeConfig, adapters: Sequence[AdapterSummary]) -> tuple[int, int]:
    """(rank, heads) to leave room for, as flags and adapters ask."""
    result = []
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
        result.append(asked or need or default)
    return result[0], result[1]


def _targets(
    config: ServeConfig, adapters: Iterable[AdapterSummary], base_shapes: Mapping[str, tuple[int, int]]
) -> tuple[str, ...]:
    known = {name.rsplit(".", 1)[-1] for name in base_shapes if "lm_head" not in name}
    used = {target for adapter in adapters for target in adapter.targets}
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
