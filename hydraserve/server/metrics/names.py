"""Which name, and so which label, the engine's numbers of an adapter are shown under."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hydraserve.server.lifecycle.served import ServedAdapter
from hydraserve.server.metrics.labels import OTHER, AdapterLabels


class AdapterNames:
    """Adapter ids are the engine's, one for each content; several names may stand for one.

    An id is shown under a name that has a label, if one of them has; else under the busiest.
    """

    def __init__(self, labels: AdapterLabels) -> None:
        self._labels = labels
        self._names: dict[int, str] = {}

    def label(self, adapter_id: int) -> str:
        """What the adapter's series have as label; "other" where no name is known."""
        name = self._names.get(adapter_id)
        return OTHER if name is None else self._labels.find(name)

    def note(self, adapter_id: int, name: str) -> None:
        """A request uses the adapter, which may be gone before anybody asks for metrics."""
        self._names.setdefault(adapter_id, name)

    def update(self, current: Mapping[str, ServedAdapter]) -> None:
        """Choose anew among the names that are served. A name that has a label stays, so that series go on."""
        names: dict[int, list[str]] = {}
        for name, served in current.items():
            self._labels.offer(name)
            names.setdefault(served.adapter_id, []).append(name)
        for adapter_id, found in names.items():
            chosen = self._names.get(adapter_id)
            if chosen not in found or self._labels.find(chosen) == OTHER:
                self._names[adapter_id] = max(found, key=self._labels.standing)

    def keep(self, adapter_ids: Collection[int]) -> None:
        """Forget all others."""
        self._names = {i: name for i, name in self._names.items() if i in adapter_ids}
