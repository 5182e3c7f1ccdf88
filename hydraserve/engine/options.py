"""What the command line tells the engine's worker processes, inside vLLM's `additional_config`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hydra_kernels import SlotCapacity

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
