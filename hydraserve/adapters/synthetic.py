"""Random adapters of a trained adapter's kind, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from hydra_kernels import HydraWeights, Layout

from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.weights import HydraAdapter

__all__ = ["make_adapter", "save_adapter"]


def make_adapter(
    base_shapes: Mapping[str, tuple[int, int]],
    targets: Collection[str] | None = None,
    rank: int | Sequence[int] = 8,
    heads: int | Sequence[int] = 4,
    seed: int = 0,
    *,
    plain: bool | None = None,
    alpha: float | None = None,
    strength: float = 0.5,
    sharpness: float = 8.0,
    dtype: torch.dtype = torch.float32,
    base_model: str | None = None,
) -> HydraAdapter:
    """An adapter whose heads all do something and whose routers really choose.

    base_shapes: module path -> (in_features, out_features) of the base model's linear layers.
    targets:     last components of the module paths to adapt ("gate_proj"); None: every module.
    rank, heads: r and E; a sequence is dealt out over the modules in turn, so that layers differ.
    seed:        another seed is another adapter; the same seed gives the same one, whatever the order of base_shapes.
    plain:       ordinary LoRA, without a router; `heads` must be 1. Default: whether `heads` is 1.
    alpha:       s = alpha / r; default 2 r.
    strength:    RMS of each module's delta for inputs of RMS 1, per head.
    sharpness:   standard deviation of the router's logits for such inputs.

    The defaults suit real language models, whose layers see inputs of RMS 0.15 to 0.6. On SmolLM2-135M with all
    modules adapted, deltas are then 5 to 16% of the layers' outputs, the routing's normalised entropy is 0.55 to 0.8,
    and greedy text differs from the base's but still is English; at a strength of 2 it no longer is.

    Raises ValueError when no module is left to adapt, or for several heads without a router.
    """
    paths = sorted(path for path in base_shapes if targets is None or path.rpartition(".")[2] in targets)
    if not paths:
        raise ValueError(f"synthetic adapter: got targets {targets}, expected last components of the base's modules")
    ranks, numbers = _dealt(rank), _dealt(heads)
    plain = set(numbers) == {1} if plain is None else plain
    if plain and set(numbers) != {1}:
        raise ValueError(f"synthetic adapter: got {heads} heads, expected 1 for plain LoRA, which has no router")
    modules = {}
    for i, path in enumerate(paths):
        layout = Layout(ranks[i % len(ranks)], numbers[i % len(numbers)], has_router=not plain)
        scaling = 2.0 if alpha is None else alpha / layout.rank
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        modules[path] = _random_module(*base_shapes[path], layout, scaling, strength, sharpness, dtype, generator)
    return HydraAdapter.of(modules, format="lora" if plain else "hydralora", base_model=base_model)


def _dealt(value: int | Sequence[int]) -> Sequence[int]:
    return [value] if isinstance(value, int) else value


def _random_module(
    in_features: int,
    out_features: int,
    layout: Layout,
    scaling: float,
    strength: float,
    sharpness: float,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> HydraWeights:
    def normal(*shape: int, std: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    return HydraWeights(
        a=normal(layout.a_rows, in_features, std=in_features**-0.5),
        b=normal(layout.heads, out_features, layout.rank, std=strength / (scaling * layout.rank**0.5)),
        layout=layout,
        router=normal(layout.heads, in_features, std=sharpness * in_features**-0.5) if layout.has_router else None,
        scaling=scaling,
    )
