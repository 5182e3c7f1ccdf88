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

    def add(self, adapter_id: int, routers: Mapping[str, RouterCount]) -> float | None:
        """Take new counts in; the share of collapsed routers, None while too little is known."""
        window = self._windows.setdefault(adapter_id, {})
        for router, count in routers.items():
            weights = np.array(count.weights)
            window[router] = window[router] + weights if router in window else weights
            while window[router].sum() > WINDOW_TOKENS:
                window[router] = window[router] / 2
        known = [weights for weights in window.values() if weights.sum() >= MIN_TOKENS]
        if not known:
            return None
        return sum(bool(weights.max() > COLLAPSED_SHARE * weights.sum()) for weights in known) / len(known)

    def keep(self, adapter_ids: Container[int]) -> None:
        """Forget all other adapters."""
        self._windows = {i: window for i, window in self._windows.items() if i in adapter_ids}
