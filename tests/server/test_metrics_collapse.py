"""The share of an adapter's routers that give one head nearly everything."""

from __future__ import annotations

from hydraserve.adapters.observation import RouterCount
from hydraserve.server.metrics.collapse import MIN_TOKENS, WINDOW_TOKENS, CollapseWindows


def count(*weights: float) -> RouterCount:
    return RouterCount(round(sum(weights)), weights, 0.0)


def test_the_share_is_of_routers_that_are_known_well_enough() -> None:
    windows = CollapseWindows()
    assert windows.add(1, {"a": count(MIN_TOKENS - 1, 0), "b": count(1, 1)}) is None
    assert windows.add(1, {"a": count(1, 0)}) == 1.0, "b has seen too few tokens"
    assert windows.add(1, {"b": count(MIN_TOKENS, 0.5 * MIN_TOKENS)}) == 0.5


def test_nearly_everything_is_more_than_95_percent() -> None:
    assert CollapseWindows().add(1, {"a": count(950, 50)}) == 0.0
    assert CollapseWindows().add(1, {"a": count(30, 960, 10)}) == 1.0


def test_the_window_follows_changes() -> None:
    windows = CollapseWindows()
    windows.add(1, {"a": count(50 * WINDOW_TOKENS, 0)})
    shares = [windows.add(1, {"a": count(WINDOW_TOKENS / 10, WINDOW_TOKENS / 10)}) for _ in range(5)]
    assert shares[-1] == 0.0


def test_adapters_are_kept_apart_and_forgotten() -> None:
    windows = CollapseWindows()
    assert windows.add(1, {"a": count(500, 0)}) == 1.0
    assert windows.add(2, {"a": count(250, 250)}) == 0.0
    windows.keep({2})
    assert windows.add(1, {"a": count(50, 0)}) is None
    assert windows.add(2, {}) == 0.0
