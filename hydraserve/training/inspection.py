"""What the weights of an adapter say about it: sizes, how much its heads differ, heads that do nothing.

Everything here reads weights only; which heads a router really uses on some text is another question, which
`hydraserve.tuner.record_routing` and the server's counters answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from hydraserve.adapters.weights import HydraAdapter, HydraWeights, natural_order

COPY_COSINE = 0.99  # heads this alike give almost the same output wherever they are used
COLLAPSED_SHARE = 0.05  # a head this small beside the largest one of its module adds almost nothing
FLAT_ROUTER = 1e-3  # of the router's largest row difference: below, the weights are 1/E for any ordinary input


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module.

    head_norms:   Frobenius norm of s * B_i A for each head: the size of what it can add.
    similarity:   mean cosine between s * B_i A and s * B_j A over all pairs of heads; None for one head.
    copies:       pairs of heads whose cosine is over COPY_COSINE.
    collapsed:    heads whose norm is under COLLAPSED_SHARE of the largest one's.
    router_norm:  Frobenius norm of the router; None without one.
    router_spread: largest norm of the difference of two rows of the router: what tells heads apart.
    """

    module: str
    rank: int
    heads: int
    scaling: float
    parameters: int
    nbytes: int
    head_norms: tuple[float, ...]
    similarity: float | None
    copies: tuple[tuple[int, int], ...]
    collapsed: tuple[int, ...]
    router_norm: float | None
    router_spread: float | None


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """A whole adapter. warnings: one sentence for each kind of fault found, empty for a healthy adapter."""

    source: str
    format: str
    base_model: str | None
    digest: str
    parameters: int
    nbytes: int
    modules: tuple[ModuleReport, ...]
    warnings: tuple[str, ...]


def inspect_weights(adapter: HydraAdapter) -> AdapterReport:
    """Look at every module of an adapter, in natural order of the paths."""
    modules = tuple(_module(path, adapter.modules[path]) for path in natural_order(adapter.modules))
    return AdapterReport(
        source=str(adapter.source),
        format=adapter.format,
        base_model=adapter.base_model,
        digest=adapter.digest,
        parameters=sum(m.parameters for m in modules),
        nbytes=adapter.nbytes,
        modules=modules,
        warnings=tuple(_warnings(modules)),
    )


def head_products(weights: HydraWeights) -> torch.Tensor:
    """Inner products <s B_i A_i, s B_j A_j> of all pairs of heads, [E, E] float32, without forming any B A.

    <B_i A_i, B_j A_j> = sum over the entries of (B_i^T B_j) * (A_i A_j^T), both [r, r].
    """
    layout = weights.layout
    b, a = weights.b.float(), weights.a.float()
    a = a.expand(layout.heads, -1, -1) if layout.shared_a else a.view(layout.heads, layout.rank, -1)
    b_products = torch.einsum("ior,jos->ijrs", b, b)
    a_products = torch.einsum("irn,jsn->ijrs", a, a)
    return weights.scaling**2 * (b_products * a_products).sum(dim=(-2, -1))


def _module(path: str, weights: HydraWeights) -> ModuleReport:
    products = head_products(weights)
    norms = products.diagonal().clamp(min=0).sqrt()
    cosine = products / (norms[:, None] * norms[None, :]).clamp(min=1e-30)
    pairs = list(combinations(range(weights.layout.heads), 2))
    largest = float(norms.max())
    collapsed = tuple(i for i, norm in enumerate(norms.tolist()) if norm <= COLLAPSED_SHARE * largest)
    tensors = [t for t in (weights.a, weights.b, weights.router, weights.bias) if t is not None]
    router = None if weights.router is None else weights.router.float()
    return ModuleReport(
        module=path,
        rank=weights.layout.rank,
        heads=weights.layout.heads,
        scaling=weights.scaling,
        parameters=sum(t.numel() for t in tensors),
        nbytes=weights.nbytes,
        head_norms=tuple(norms.tolist()),
        similarity=sum(float(cosine[i, j]) for i, j in pairs) / len(pairs) if pairs else None,
        copies=tuple((i, j) for i, j in pairs if cosine[i, j] > COPY_COSINE),
        collapsed=collapsed,
        router_norm=None if router is None else float(router.norm()),
        router_spread=None if router is None else float(torch.cdist(router, router).max()),
    )


def _warnings(modules: Sequence[ModuleReport]) -> list[str]:
    """One sentence for each kind of fault, with an example."""
    untrained = [m for m in modules if max(m.head_norms) == 0]
    copies = [m for m in modules if m.copies]
    collapsed = [m for m in modules if m.collapsed and max(m.head_norms) > 0]
    flat = [m for m in modules if m.heads > 1 and m.router_spread is not None and m.router_spread < FLAT_ROUTER]
    warnings = []
    if untrained:
        warnings.append(f"every B is zero, so nothing is added: {_where(untrained, modules)}")
    if copies:
        i, j = copies[0].copies[0]
        warnings.append(
            f"heads are copies of one another (in {copies[0].module} {i} and {j}): {_where(copies, modules)}; "
            "fewer heads would do the same"
        )
    if collapsed:
        warnings.append(
            f"heads collapsed to nearly nothing (in {collapsed[0].module} {collapsed[0].collapsed[0]}): "
            f"{_where(collapsed, modules)}; the router may have starved them: try --load-balance"
        )
    if flat:
        warnings.append(f"the router gives every head the same weight: {_where(flat, modules)}")
    return warnings


def _where(found: Sequence[ModuleReport], modules: Sequence[ModuleReport]) -> str:
    return f"{len(found)} of {len(modules)} modules, first {found[0].module}"
