"""The truth: the gate and the delta in plain torch, in float32 or float64, one token group at a time.

Source: HydraLoRA, arXiv:2404.19245, section 3. Everything else in this package must agree with this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hydra_kernels.weights import Carry, HydraWeights, Layout


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


def router_logits(
    x: torch.Tensor, weights: HydraWeights, dtype: torch.dtype = torch.float32, carried: torch.Tensor | None = None
) -> torch.Tensor | None:
    """[T, E] for x [T, in]; `carried` for a layer that takes them from another, None for one without routing."""
    if weights.router is None:
        return None if carried is None or weights.layout.carry is not Carry.TAKES else carried.to(dtype)
    logits = x.to(dtype) @ weights.router.to(dtype).T
    return logits if weights.bias is None else logits + weights.bias.to(dtype)


def routing_weights(
    x: torch.Tensor, weights: HydraWeights, dtype: torch.dtype = torch.float32, carried: torch.Tensor | None = None
) -> torch.Tensor:
    """w [T, E] for x [T, in]. carried: [T, E], the logits of the layer that this one takes them from."""
    return gate(router_logits(x, weights, dtype, carried), weights.layout, x.shape[0], dtype)


def delta(
    x: torch.Tensor, weights: HydraWeights, dtype: torch.dtype = torch.float32, carried: torch.Tensor | None = None
) -> torch.Tensor:
    """s * sum_i w_i * B_i (A_i x), [T, out], for x [T, in]; computed and returned in `dtype`. carried: see above."""
    layout = weights.layout
    u = x.to(dtype) @ weights.a.to(dtype).T
    u = u[:, None, :] if layout.shared_a else u.view(-1, layout.heads, layout.rank)  # [T, 1 | E, r]
    w = routing_weights(x, weights, dtype, carried).to(x.device)
    h = w[:, :, None] * u  # [T, E, r]
    return weights.scaling * torch.einsum("ter,eor->to", h, weights.b.to(dtype))


def linear(
    y: torch.Tensor,
    x: torch.Tensor,
    token_slots: Sequence[int],
    slots: Sequence[Sequence[HydraWeights | None] | None],
    out_slices: Sequence[int],
    dtype: torch.dtype = torch.float32,
    carry: torch.Tensor | None = None,
) -> torch.Tensor:
    """y + delta of a merged layer, in `dtype`; of the arguments only `carry` is changed.

    y:           [T, sum(out_slices)], the base layer's output.
    x:           [T, in].
    token_slots: slot of each token, -1 for the base model's own tokens.
    slots:       for each slot, one HydraWeights (or None: not adapted) a slice; None for an empty slot.
    out_slices:  output size of each slice, in the order of y's columns.
    carry:       [T, heads], where layers leave their logits and take those of others, see `Carry`.
    """
    result = y.to(dtype).clone()
    for slot in sorted(set(token_slots) - {-1}):
        rows = torch.tensor([i for i, s in enumerate(token_slots) if s == slot])
        start = 0
        for out, weights in zip(out_slices, slots[slot] or [None] * len(out_slices), strict=True):
            if weights is not None:
                heads = weights.layout.heads
                carried = None if carry is None else carry[rows, :heads]
                result[rows, start : start + out] += delta(x[rows], weights, dtype, carried)
                if weights.layout.carry is Carry.GIVES and carry is not None:
                    logits = router_logits(x[rows], weights, dtype)
                    assert logits is not None
                    carry[rows, :heads] = logits.to(carry.dtype)
            start += out
    return result
