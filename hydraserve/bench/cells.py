"""Which arms are measured under which loads, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from hydraserve.bench.arms import REFERENCE_LARGEST_BATCH, Arm
from hydraserve.bench.result import CellRuns, LeftOut
from hydraserve.bench.workload import Load
from hydraserve.errors import ConfigError


def choose_cells(
    arms: Sequence[Arm], loads: Sequence[Load], requests_of: Callable[[Load], int], popularity: str
) -> tuple[list[CellRuns], list[LeftOut]]:
    """The cells, load by load, so that the runs that are compared follow one another; and what is not measured.

    requests_of: how many requests one run of a load has.

    Raises ConfigError when nothing is left of what was to be compared.
    """
    cells: list[CellRuns] = []
    left_out: list[LeftOut] = []
    for load in loads:
        for arm in arms:
            why = why_not(arm, load, requests_of(load), popularity)
            if why is None:
                cells.append(CellRuns(arm, load))
            else:
                left_out.append(LeftOut(arm, load, why))
    wanted = any(arm.adapters for arm in arms)
    if not cells or (wanted and not any(cell.arm.adapters for cell in cells)):
        raise ConfigError(
            what="comparison",
            got="nothing to measure" if not left_out else "; ".join(dict.fromkeys(item.text for item in left_out)),
            expected="at least one arm with adapters that can be measured",
            fix="fewer --adapters, a larger --batch, more --waves or --requests, or other --arms",
        )
    return cells, left_out


def why_not(arm: Arm, load: Load, requests: int, popularity: str) -> str | None:
    """Why a cell would be untrue or say what another one does; None: it is measured.

    Where adapters are drawn (uniform, zipf), more adapters than requests are still another draw than fewer.
    """
    if arm.kind == "reference" and load.concurrency is None:
        return "the reference has no queue for an open loop"
    if arm.kind == "reference" and load.value > REFERENCE_LARGEST_BATCH:
        return f"the reference is measured up to a batch of {REFERENCE_LARGEST_BATCH}"
    if popularity == "distinct" and arm.adapters > requests:
        return f"{requests} request{'s' * (requests > 1)} a run cannot ask for {arm.adapters} adapters in turn"
    return None


def turns(cells: Sequence[CellRuns], repeat: int) -> Iterator[CellRuns]:
    """The cells in the order of one repeat: load by load, the arms of each in another order than in the repeat before.

    Every second repeat goes backwards, and every pair of repeats begins one arm later, so no arm is always first and
    none always follows the same other one: what a run leaves behind (heat, caches) meets all arms alike.
    """
    for _, group in groupby(cells, lambda cell: cell.load):
        arms = list(group)
        first = repeat // 2 % len(arms)
        arms = arms[first:] + arms[:first]
        yield from reversed(arms) if repeat % 2 else arms
