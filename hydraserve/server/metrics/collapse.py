"""Whether an adapter's routers still choose: the share of them that give one head nearly everything."""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np
import numpy.typing as npt

from hydraserve.adapters.observation import RouterCount

# A head with more than this of a router's weight leaves nothing to the others: even of two heads.
COLLAPSED_SHARE = 0.95
# Fewer tokens say little: a short prompt may really need one head only.
MIN_TOKENS = 100
# The window halves what it holds when it holds more, so that it follows changes.
WINDOW_TOKENS = 5000


class CollapseWindows:
    """Recent weights of each adapter's routers."""

    def __init__(self) -> None:
        self._windows: dict[int, dict[str, npt.NDArray[np.float64]]] = {}

    def add(self, adapter_id: int, routers: Mapping[str, RouterCount]) -> None:
        """Take new counts in."""
        window = self._windows.setdefault(adapter_id, {})
        for router, count in routers.items():
            weights = np.array(count.weights)
            window[router] = window[router] + weights if router in window else weights
            while window[router].sum() > WINDOW_TOKENS:
                window[router] = window[router] / 2

    def shares(self) -> dict[int, float]:
        """The share of collapsed routers, of each adapter that enough is known of."""
        known = {i: [w for w in window.values() if w.sum() >= MIN_TOKENS] for i, window in self._windows.items()}
        return {
            i: sum(bool(w.max() > COLLAPSED_SHARE * w.sum()) for w in windows) / len(windows)
            for i, windows in known.items()
            if windows
        }

    def keep(self, adapter_ids: Container[int]) -> None:
        """Forget all other adapters."""
        self._windows = {i: window for i, window in self._windows.items() if i in adapter_ids}
