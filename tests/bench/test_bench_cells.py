"""Which cells are measured, and in which order."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from hydraserve.bench.arms import Arm
from hydraserve.bench.cells import choose_cells, turns, why_not
from hydraserve.bench.result import CellRuns
from hydraserve.bench.workload import Load
from hydraserve.errors import ConfigError


def arm(kind: str, adapters: int = 0) -> Arm:
    return Arm(f"{kind}-{adapters}", f"{kind} {adapters}", kind, "server", ("m",) * max(1, adapters), adapters)


@pytest.mark.parametrize(
    ("measured", "load", "requests", "popularity", "why"),
    [
        (arm("off"), Load(concurrency=1), 1, "distinct", None),
        (arm("hydra", 1), Load(concurrency=1), 1, "distinct", None),
        (arm("hydra", 8), Load(concurrency=4), 4, "distinct", "4 requests a run cannot ask for 8 adapters"),
        (arm("hydra", 8), Load(concurrency=4), 8, "distinct", None),  # in two waves
        (arm("hydra", 16), Load(concurrency=8), 8, "zipf", None),
        (arm("hydra", 16), Load(concurrency=8), 8, "uniform", None),
        (arm("hydra", 8), Load(rate=0.5), 64, "distinct", None),
        (arm("hydra", 65), Load(rate=0.5), 64, "distinct", "64 requests"),
        (arm("reference", 8), Load(concurrency=8), 8, "distinct", None),
        (arm("reference", 1), Load(concurrency=32), 32, "distinct", "up to a batch of 8"),
        (arm("reference", 1), Load(rate=1.0), 64, "distinct", "no queue"),
    ],
)
def test_which_cells_are_left_out(measured: Arm, load: Load, requests: int, popularity: str, why: str | None) -> None:
    found = why_not(measured, load, requests, popularity)
    assert (found is None) if why is None else (found is not None and why in found)


def test_nothing_is_left_out_silently() -> None:
    arms, loads = [arm("off"), arm("hydra", 2), arm("reference", 2)], [Load(concurrency=n) for n in (1, 8, 32)]
    cells, left_out = choose_cells(arms, loads, lambda load: load.concurrency or 0, "distinct")
    assert [(cell.arm.kind, cell.load.concurrency) for cell in cells] == [
        *(("off", 1), ("off", 8), ("hydra", 8), ("reference", 8), ("off", 32), ("hydra", 32)),
    ]
    assert [(item.arm.kind, item.load.concurrency) for item in left_out] == [
        *(("hydra", 1), ("reference", 1), ("reference", 32)),
    ]


@pytest.mark.parametrize("arms", [[], [arm("off"), arm("hydra", 16)], [arm("reference", 16)]])
def test_a_comparison_of_nothing_is_refused(arms: list[Arm]) -> None:
    with pytest.raises(ConfigError, match="comparison"):
        choose_cells(arms, [Load(concurrency=8)], lambda _: 8, "distinct")


def test_no_arm_is_always_first_and_none_always_follows_another() -> None:
    cells = [CellRuns(arm(name), load) for load in (Load(rate=1.0), Load(rate=2.0)) for name in "abcd"]
    repeats = [[cell.arm.kind for cell in turns(cells, repeat)] for repeat in range(8)]
    assert all(sorted(names[:4]) == sorted(names[4:]) == list("abcd") for names in repeats), "load by load"
    for place in range(4):
        assert Counter(names[place] for names in repeats) == dict.fromkeys("abcd", 2)
    follows = Counter(pair for names in repeats for pair in pairwise(names[:4]))
    assert all(follows[a, b] == follows[b, a] for a, b in follows)
