"""Full garbage collections in the worker do not walk what the engine's start left there."""

from __future__ import annotations

import gc

from hydraserve.engine.worker import freeze_heap


def test_what_is_there_at_the_start_is_frozen_once() -> None:
    gc.unfreeze()
    try:
        freeze_heap()
        frozen = gc.get_freeze_count()
        assert frozen > 10_000  # torch alone brings more
        later: list[list[object]] = [[] for _ in range(1000)]
        freeze_heap()
        assert gc.get_freeze_count() <= frozen  # some of it may have ended since
        assert len(later) == 1000
    finally:
        gc.unfreeze()
