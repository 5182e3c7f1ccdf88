"""What the server asks of the engine about routers and requests. Neither imports the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RouterCount:
    """What one router of an adapter did with the counted tokens.

    tokens:  how many.
    weights: sum over them of each head's routing weight; all together they sum to `tokens`.
    entropy: sum over them of the weights' entropy, divided by that of equal weights; at most `tokens`.
    """

    tokens: int
    weights: tuple[float, ...]
    entropy: float


@dataclass(frozen=True)
class SlotCounts:
    """Adapter ids' ways in and out of slots. hits: adapters that were in one when requests began. misses: that were
    not when a step needed them."""

    loads: Mapping[int, int] = field(default_factory=dict)
    evictions: Mapping[int, int] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0


@dataclass(frozen=True)
class EngineCounts:
    """What the engine counted since it was last asked, over all its processes.

    routers: adapter id -> path of the linear layer -> count; empty where router metrics are off.
    steps:   steps that routers were counted in.
    """

    routers: Mapping[int, Mapping[str, RouterCount]]
    steps: int
    slots: SlotCounts


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routing weights of one request.

    routers: paths of the linear layers, layer by layer.
    heads:   number of heads of each router.
    weights: [tokens, routers, most heads] float32; NaN where a head does not exist and for tokens that no layer has
             seen, as the last one generated.
    """

    routers: tuple[str, ...]
    heads: tuple[int, ...]
    weights: npt.NDArray[np.float32]


@dataclass(frozen=True)
class RequestEnd:
    """How a request went. Seconds are None where nothing was measured.

    outcome:      stop, length, abort, error, ... as the engine says it.
    first_token:  seconds from the request's arrival to its first token.
    per_token:    mean seconds between two tokens after that.
    """

    outcome: str
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    first_token: float | None = None
    per_token: float | None = None


class RequestObserver(Protocol):
    """Who wants to hear of each request. `adapter`: the engine's name for it, None for the base model."""

    def begin(self, adapter: str | None) -> Any:
        """A request has arrived; what is returned comes back with `end`."""

    def end(self, begun: Any, end: RequestEnd) -> None: ...


class EngineObservation(Protocol):
    """The engine, as far as it can be watched. Errors are HydraServeError's subclasses."""

    observer: RequestObserver | None

    async def take_counts(self) -> EngineCounts:
        """What was counted since the last call."""

    def requests(self) -> Mapping[str | None, tuple[int, int]]:
        """Adapter (None: the base model) -> its requests in the engine that have a first token, and that have none."""

    async def start_trace(self, trace: str, limit: int) -> None:
        """Record the routing weights of the request whose id contains `trace`, of its first `limit` tokens."""

    async def finish_trace(self, trace: str) -> RoutingTrace:
        """End it. What no router was seen in has no routers."""

    async def count_prompt(self, state: Any, body: Mapping[str, Any], chat: bool) -> int:
        """How many tokens the prompt has that `generate` would compute; refuses what it would refuse at once."""

    async def generate(self, state: Any, body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
        """The answer of vLLM's handler of /v1/completions or /v1/chat/completions. state: the app's."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens, special ones included."""

    @property
    def max_tokens(self) -> int:
        """The longest request, prompt and answer."""
