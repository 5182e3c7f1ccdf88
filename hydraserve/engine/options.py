"""What the command line tells the engine's worker processes, inside vLLM's `additional_config`."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from hydra_kernels import SlotCapacity

from hydraserve.errors import ConfigError

KEY = "hydraserve"

# Without our command line (`vllm serve --enable-lora` with the plugin installed) vLLM says only the largest
# rank; this many heads are then allowed for.
DEFAULT_MAX_HEADS = 8


@dataclass(frozen=True)
class EngineOptions:
    """capacity: the largest adapter a slot takes. router_metrics: every so many steps routers are counted, 0: never."""

    capacity: SlotCapacity = field(default_factory=lambda: default_capacity(16))
    router_metrics: int = 0

    def to_config(self) -> dict[str, Any]:
        """The value for vLLM's `--additional-config`."""
        return {KEY: asdict(self)}

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> EngineOptions:
        given = (vllm_config.additional_config or {}).get(KEY)
        if given is None:
            return cls(default_capacity(vllm_config.lora_config.max_lora_rank))
        return cls(SlotCapacity(**given["capacity"]), given["router_metrics"])


def default_capacity(max_rank: int, max_heads: int = DEFAULT_MAX_HEADS) -> SlotCapacity:
    """Room for a HydraLoRA adapter of this rank and number of heads."""
    return SlotCapacity(rows=max_rank + max_heads, k=max_rank * max_heads, heads=max_heads)


# The only values that vLLM's LoRAConfig takes (vllm.config.lora.MaxLoRARanks, 0.32).
_LEGAL_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def legal_max_rank(rank: int) -> int:
    """The smallest value of vLLM's --max-lora-rank that is at least `rank` (capped: our slots have their own size)."""
    return next((legal for legal in _LEGAL_RANKS if legal >= rank), _LEGAL_RANKS[-1])


def refuse_wrong_results(*, fully_sharded_loras: bool) -> None:
    """Raises ConfigError for settings of vLLM under which a routed adapter would be computed wrongly."""
    if fully_sharded_loras:
        raise ConfigError(
            what="--fully-sharded-loras",
            got="given",
            expected="not given: it cuts A by rank, and the router's rows with it",
            fix="leave it out; B's rows and row-parallel A's columns are sharded anyway",
        )
    if os.environ.get("VLLM_LORA_ENABLE_DUAL_STREAM", "0").lower() not in ("", "0", "false"):
        raise ConfigError(
            what="VLLM_LORA_ENABLE_DUAL_STREAM",
            got="set",
            expected="unset: that path adds the adapter's delta into a buffer of its own, which is not supported",
            fix="unset VLLM_LORA_ENABLE_DUAL_STREAM",
        )
