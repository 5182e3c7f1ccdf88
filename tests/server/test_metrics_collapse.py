"""The share of an adapter's routers that give one head nearly everything."""

from __future__ import annotations

from hydraserve.adapters.observation import RouterCount
from hydraserve.server.metrics.collapse import MIN_TOKENS, WINDOW_TOKENS, CollapseWindows


def count(*weights: float) -> RouterCount:
    return RouterCount(round(sum(weights)), weights, 0.0)


def shares(windows: CollapseWindows, adapter_id: int = 1, **routers: RouterCount) -> float | None:
    """The adapter's share after these counts."""
    windows.add(adapter_id, routers)
    return windows.shares().get(adapter_id)


def test_the_share_is_of_routers_that_are_known_well_enough() -> None:
    windows = CollapseWindows()
    assert shares(windows, a=count(MIN_TOKENS - 1, 0), b=count(1, 1)) is None
    assert shares(windows, a=count(1, 0)) == 1.0, "b has seen too few tokens"
    assert shares(windows, b=count(MIN_TOKENS, 0.5 * MIN_TOKENS)) == 0.5


def test_nearly_everything_is_more_than_95_percent() -> None:
    assert shares(CollapseWindows(), a=count(950, 50)) == 0.0
    assert shares(CollapseWindows(), a=count(30, 960, 10)) == 1.0


def test_the_window_follows_changes() -> None:
    windows = CollapseWindows()
    assert shares(windows, a=count(50 * WINDOW_TOKENS, 0)) == 1.0
    found = [shares(windows, a=count(WINDOW_TOKENS / 10, WINDOW_TOKENS / 10)) for _ in range(5)]
    assert found[-1] == 0.0


def test_adapters_are_kept_apart_and_forgotten() -> None:
    windows = CollapseWindows()
    assert shares(windows, 1, a=count(500, 0)) == 1.0
    assert shares(windows, 2, a=count(250, 250)) == 0.0
    windows.keep({2})
    assert windows.shares() == {2: 0.0}
    assert shares(windows, 1, a=count(50, 0)) is None
