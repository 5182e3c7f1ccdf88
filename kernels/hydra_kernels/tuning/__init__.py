"""Block sizes of the Triton kernels: what they are, measured tables by GPU, and defaults where none was measured."""

from __future__ import annotations

from functools import cache

import torch

from hydra_kernels.tuning import table
from hydra_kernels.tuning.config import ExpandConfig, ShrinkConfig, default_expand, default_shrink, power_of_two

__all__ = ["ExpandConfig", "ShrinkConfig", "expand_config", "shrink_config"]


def shrink_config(
    device: torch.device, dtype: torch.dtype, tokens: int, in_features: int, rows: int, slices: int
) -> ShrinkConfig:
    """Block sizes for `tokens` rows of x [T, in] against [A; R] of `rows` rows in each of `slices` slices."""
    return _shrink(device, dtype, power_of_two(tokens), in_features, rows, slices)


def expand_config(
    device: torch.device, dtype: torch.dtype, tokens: int, out: int, k: int, slices: int, splits: int
) -> ExpandConfig:
    """Block sizes for `tokens` rows of y [T, out] and B with `k` columns; `out` is the sum over `slices` slices.

    splits: partial sums of each z, see `ShrinkConfig.splits`; 1 when z is summed.
    """
    return _expand(device, dtype, power_of_two(tokens), out, k, slices, splits)


# Keyed by powers of two of the tokens, so that a server that sees every batch size keeps a few dozen entries.
@cache
def _shrink(
    device: torch.device, dtype: torch.dtype, tokens: int, in_features: int, rows: int, slices: int
) -> ShrinkConfig:
    found = _find("shrink", device, dtype, (in_features, rows, slices), tokens)
    if isinstance(found, ShrinkConfig):
        return found
    return default_shrink(tokens, in_features, rows, slices, dtype.itemsize)


@cache
def _expand(
    device: torch.device, dtype: torch.dtype, tokens: int, out: int, k: int, slices: int, splits: int
) -> ExpandConfig:
    found = _find("expand", device, dtype, (out, k, slices), tokens)
    return found if isinstance(found, ExpandConfig) else default_expand(tokens, out, k, dtype.itemsize, splits)


def _find(
    op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], tokens: int
) -> ShrinkConfig | ExpandConfig | None:
    """The measured configuration; tables are measured with 16-bit weights, the only ones that use tensor cores."""
    if device.type != "cuda" or dtype.itemsize != 2:
        return None
    known = table.load(torch.cuda.get_device_name(device))
    return None if known is None else known.find(op, shape, tokens)
