"""The custom ops of stacked slots, as torch.compile and CUDA graphs see them: opaque, with fake implementations."""

from __future__ import annotations

import torch

from hydra_kernels.metadata import NUM_SEGMENTS
from hydra_kernels.ops import grouped


@torch.library.custom_op("hydra_kernels::shrink", mutates_args=())
def shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    layout: torch.Tensor,
    meta_host: torch.Tensor,
    meta_device: torch.Tensor,
    max_slots: int,
) -> torch.Tensor:
    return grouped.shrink(x, a, layout, meta_host, max_slots)


@shrink.register_fake
def _(
    x: torch.Tensor,
    a: torch.Tensor,
    layout: torch.Tensor,
    meta_host: torch.Tensor,
    meta_device: torch.Tensor,
    max_slots: int,
) -> torch.Tensor:
    return x.new_empty((a.shape[1], x.shape[0], a.shape[2]), dtype=torch.float32)


@torch.library.custom_op("hydra_kernels::expand_", mutates_args=("y",))
def expand_(
    y: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    layout: torch.Tensor,
    bias: torch.Tensor,
    slice_start: torch.Tensor,
    meta_host: torch.Tensor,
    meta_device: torch.Tensor,
    max_slots: int,
) -> None:
    grouped.expand_(y, z, b, layout, bias, slice_start, meta_host, max_slots)


@torch.library.custom_op("hydra_kernels::linear_", mutates_args=("y",))
def linear_(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    layout: torch.Tensor,
    bias: torch.Tensor,
    slice_start: torch.Tensor,
    meta_host: torch.Tensor,
    meta_device: torch.Tensor,
    max_slots: int,
) -> None:
    if int(meta_host[NUM_SEGMENTS]) == 0:
        return
    z = grouped.shrink(x, a, layout, meta_host, max_slots)
    grouped.expand_(y, z, b, layout, bias, slice_start, meta_host, max_slots)
