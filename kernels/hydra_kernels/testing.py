"""What tests and benchmarks share: mixes of adapters in a batch, random weights, tolerances, NaN poison."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from hydra_kernels.slots import SlotCapacity
from hydra_kernels.weights import HydraWeights, Layout

# How adapters are spread over the tokens of a batch; names as in the punica paper (arXiv:2310.18547).
MIXES = ("none", "identical", "distinct", "uniform", "zipf", "skewed", "partial")

# Largest allowed |got - expected| / (1 + |expected|), by dtype of the weights. float32: sums of up to a few
# thousand terms in another order. bfloat16 and float16: one rounding of h and one of y at 2^-8 and 2^-11.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def token_slots(mix: str, tokens: int, slots: int, seed: int = 0) -> np.ndarray:
    """[tokens] slot ids, -1 for no adapter. "zipf": exponent 1.5; "skewed": one slot has 3 of 4 tokens;
    "partial": uniform, every second token without an adapter."""
    rng = np.random.default_rng(seed)
    uniform = rng.integers(0, slots, tokens)
    table: dict[str, Callable[[], npt.NDArray[np.generic]]] = {
        "none": lambda: np.full(tokens, -1),
        "identical": lambda: np.full(tokens, slots - 1),
        "distinct": lambda: np.arange(tokens) % slots,
        "uniform": lambda: uniform,
        "zipf": lambda: np.minimum(rng.zipf(1.5, tokens) - 1, slots - 1),
        "skewed": lambda: np.where(rng.random(tokens) < 0.75, 0, uniform),
        "partial": lambda: np.where(np.arange(tokens) % 2 == 0, -1, uniform),
    }
    return table[mix]().astype(np.int32)


def random_weights(
    in_features: int, out_features: int, layout: Layout, dtype: torch.dtype, seed: int = 0
) -> HydraWeights:
    """Weights of a trained adapter's order of size: delta about as large as x, logits of order one."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * std).to(dtype)

    return HydraWeights(
        a=normal(layout.a_rows, in_features, std=in_features**-0.5),
        b=normal(layout.heads, out_features, layout.rank, std=layout.rank**-0.5),
        layout=layout,
        router=normal(layout.heads, in_features, std=2 * in_features**-0.5) if layout.has_router else None,
        bias=torch.randn(layout.heads, generator=g) if layout.has_bias else None,
        scaling=2.0,
    )


def capacity_for(layouts: Sequence[Layout]) -> SlotCapacity:
    """The smallest capacity that holds all of them."""
    return SlotCapacity(
        rows=max(lay.z_rows for lay in layouts),
        k=max(lay.k for lay in layouts),
        heads=max(lay.heads for lay in layouts),
    )


def max_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest |got - expected| / (1 + |expected|); infinite when `got` holds a NaN."""
    error = ((got.double() - expected.double()).abs() / (1 + expected.double().abs())).max().item()
    return float("inf") if np.isnan(error) else error


def poison(t: torch.Tensor) -> torch.Tensor:
    """Fill with NaN, so that what a kernel forgets to write shows."""
    return t.fill_(float("nan"))
