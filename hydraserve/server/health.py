"""Whether a server is ready for requests: what load balancers and supervisors ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hydraserve.adapters.registry import AdapterEntry, Origin
from hydraserve.server.traffic import Traffic


@dataclass(frozen=True)
class Readiness:
    """traffic:      what the server takes.
    engine_dead:  whether the engine has ended.
    adapters:     those that the server has; the ones it was started with have to be there.
    """

    traffic: Traffic
    engine_dead: Callable[[], bool]
    adapters: Callable[[], Iterable[AdapterEntry]]

    def obstacle(self) -> str | None:
        """Why requests should go elsewhere; None when they should come."""
        if self.engine_dead():
            return "the engine has ended"
        if self.traffic.draining:
            return "draining"
        missing = [e.name for e in self.adapters() if e.origin is Origin.COMMAND_LINE and e.version is None]
        return f"adapters not loaded: {', '.join(missing)}" if missing else None
