"""The truth: the gate and the delta in plain torch, in float32 or float64, one token group at a time.

Source: HydraLoRA, arXiv:2404.19245, section 3. Everything else in this package must agree with this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hydra_kernels.weights import HydraWeights, Layout


def gate(logits: torch.Tensor | None, layout: Layout, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Routing weights w [tokens, E] from the router's logits [tokens, E] (None: no router)."""
    if logits is None:
        return torch.full((tokens, layout.heads), 1.0 / layout.heads, dtype=dtype)
    w = torch.softmax(logits, dim=-1)
    if layout.top_k:
        order = torch.sort(w, dim=-1, descending=True, stable=True).indices[:, : layout.top_k]
        w = w * torch.zeros_like(w).scatter_(1, order, 1.0)
        if layout.renormalize:
            w = w / w.sum(dim=-1, keepdim=True)
    return w


def routing_weights(x: torch.Tensor, weights: HydraWeights, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """w [T, E] for x [T, in]."""
    logits = None
    if weights.router is not None:
        logits = x.to(dtype) @ weights.router.to(dtype).T
        if weights.bias is not None:
            logits = logits + weights.bias.to(dtype)
    return gate(logits, weights.layout, x.shape[0], dtype)


def delta(x: torch.Tensor, weights: HydraWeights, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """s * sum_i w_i * B_i (A_i x), [T, out], for x [T, in]; computed and returned in `dtype`."""
    layout = weights.layout
    u = x.to(dtype) @ weights.a.to(dtype).T
    u = u[:, None, :] if layout.shared_a else u.view(-1, layout.heads, layout.rank)  # [T, 1 | E, r]
    h = routing_weights(x, weights, dtype)[:, :, None] * u  # [T, E, r]
    return weights.scaling * torch.einsum("ter,eor->to", h, weights.b.to(dtype))


def linear(
    y: torch.Tensor,
    x: torch.Tensor,
    token_slots: Sequence[int],
    slots: Sequence[Sequence[HydraWeights | None] | None],
    out_slices: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """y + delta of a merged layer, in `dtype`; nothing is changed in place.

    y:           [T, sum(out_slices)], the base layer's output.
    x:           [T, in].
    token_slots: slot of each token, -1 for the base model's own tokens.
    slots:       for each slot, one HydraWeights (or None: not adapted) a slice; None for an empty slot.
    out_slices:  output size of each slice, in the order of y's columns.
    """
    result = y.to(dtype).clone()
    for slot in sorted(set(token_slots) - {-1}):
        rows = torch.tensor([i for i, s in enumerate(token_slots) if s == slot])
        start = 0
        for out, weights in zip(out_slices, slots[slot] or [None] * len(out_slices), strict=True):
            if weights is not None:
                result[rows, start : start + out] += delta(x[rows], weights, dtype)
            start += out
    return result
