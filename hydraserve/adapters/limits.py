"""How large an adapter may be. All of it is checked before anything of that size is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from hydraserve.errors import LimitError

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """The largest adapter the server is willing to load.

    The defaults are several times what published adapters need (a 70B model, rank 64, 8 heads, all layers:
    about 6 GiB in bfloat16, 5 thousand tensors), yet small enough to bound the work on a hostile file.

    file_bytes:      of the file with the tensors.
    config_bytes:    of adapter_config.json.
    header_bytes:    of what describes the tensors: the JSON header of safetensors, the pickle inside a .bin.
    tensors:         how many tensors.
    rank, heads:     r and E of any module.
    pattern_seconds: for matching all regular expressions of one adapter_config.json.
    """

    file_bytes: int = 16 * GIB
    config_bytes: int = MIB
    header_bytes: int = 32 * MIB
    tensors: int = 100_000
    rank: int = 1024
    heads: int = 256
    pattern_seconds: float = 2.0

    def check(self, name: str, got: int, limit: int, *, unit: str = "") -> None:
        """Raises LimitError when `got` is over `limit`."""
        if got > limit:
            raise LimitError(
                name,
                got=f"{got:,}{unit}",
                expected=f"at most {limit:,}{unit}",
                fix="check that the file is the adapter you mean; if it is, raise this limit",
            )


DEFAULT_LIMITS = AdapterLimits()
