"""Whether a server is ready for requests: what load balancers and supervisors ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hydraserve.server.traffic import Traffic


@dataclass(frozen=True)
class Readiness:
    """Of a server that answers, so its model and the adapters of its command line are loaded and it has looked through
    --adapter-dir: it does not listen before, and ends when it cannot.

    traffic:      what the server takes.
    engine_dead:  whether the engine has ended.
    """

    traffic: Traffic
    engine_dead: Callable[[], bool]

    def obstacle(self) -> str | None:
        """Why requests should go elsewhere; None when they should come."""
        if self.engine_dead():
            return "the engine has ended"
        return "draining" if self.traffic.draining else None
