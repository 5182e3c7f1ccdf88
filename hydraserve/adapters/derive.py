"""Adapters derived from others for evaluation: one head alone, only the best heads, or the router off.

    NAME@head=2      head 2 alone, as plain LoRA: s * B_2 A x
    NAME@top_k=1     the k largest routing weights of each token, scaled to sum to one
    NAME@uniform     no router: every head with weight 1/E

They are ordinary adapters made from the same tensors (nothing is copied), with a digest of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from hydra_kernels import Carry

from hydraserve.adapters.weights import HydraAdapter, HydraWeights
from hydraserve.errors import UnknownAdapterError

_SPEC = re.compile(r"(?P<kind>head|top_k)=(?P<number>0|[1-9][0-9]{0,3})|uniform")
_EXPECTED = "head=N, top_k=N or uniform after the @"


def split_derived(name: str) -> tuple[str, str] | None:
    """("sql", "head=2") of "sql@head=2"; None when `name` does not end in a derivation."""
    parent, at, spec = name.rpartition("@")
    return (parent, spec) if at and parent and _SPEC.fullmatch(spec) else None


def check_spec(spec: str, heads: int) -> None:
    """Raises UnknownAdapterError for what cannot be derived from any adapter of at most `heads` heads."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise _unknown(spec, f"{spec!r}", _EXPECTED)
    if match["kind"] == "head" and int(match["number"]) >= heads:
        raise _unknown(spec, f"head {match['number']}", f"0 to {heads - 1}, the adapter's heads")
    if match["kind"] == "top_k" and not 1 <= int(match["number"]) <= heads:
        raise _unknown(spec, f"top_k={match['number']}", f"1 to {heads}, the adapter's heads")


def derive(adapter: HydraAdapter, spec: str) -> HydraAdapter:
    """The adapter that `spec` ("head=2", "top_k=1", "uniform") makes of `adapter`.

    Modules without a router stay as they are under `top_k` and `uniform`, and so do modules with at most k heads
    under `top_k=k`.

    Raises UnknownAdapterError for another spec, for a head that some module does not have, for k = 0 or more than
    any module has, and when the adapter has no router at all.
    """
    change = _change(adapter, spec)
    modules = {path: change(path, weights) for path, weights in adapter.modules.items()}
    return HydraAdapter.of(modules, base_model=adapter.base_model, source=adapter.source)


def _change(adapter: HydraAdapter, spec: str) -> Callable[[str, HydraWeights], HydraWeights]:
    check_spec(spec, adapter.heads)
    match = _SPEC.fullmatch(spec)
    assert match is not None
    if not any(layout.has_router for layout in adapter.layouts):
        raise _unknown(spec, "an adapter without a router", "an adapter whose heads a router mixes")
    if match["kind"] is None:
        return lambda _, weights: _uniform(weights)
    number = int(match["number"])
    if match["kind"] == "head":
        return lambda path, weights: _one_head(path, weights, number)
    return lambda _, weights: _top_k(weights, number)


def _one_head(path: str, weights: HydraWeights, head: int) -> HydraWeights:
    layout = weights.layout
    if head >= layout.heads:
        raise _unknown(f"head={head}", f"head {head} of {path}", f"0 to {layout.heads - 1}, the heads of this module")
    rows = slice(None) if layout.shared_a else slice(head * layout.rank, (head + 1) * layout.rank)
    plain = replace(layout, heads=1, shared_a=True, top_k=0, has_router=False, has_bias=False, carry=Carry.NONE)
    return replace(weights, a=weights.a[rows], b=weights.b[head : head + 1], router=None, bias=None, layout=plain)


def _top_k(weights: HydraWeights, k: int) -> HydraWeights:
    if not weights.layout.routed or k >= weights.layout.heads:
        return weights
    return replace(weights, layout=replace(weights.layout, top_k=k, renormalize=True))


def _uniform(weights: HydraWeights) -> HydraWeights:
    layout = replace(weights.layout, top_k=0, has_router=False, has_bias=False, carry=Carry.NONE)
    return replace(weights, router=None, bias=None, layout=layout)


def _unknown(spec: str, got: str, expected: str) -> UnknownAdapterError:
    return UnknownAdapterError(f"derived adapter @{spec}", got=got, expected=expected, fix="use another derivation")
