"""Reading the router: the routing weights of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hydraserve.tuner.layer import HydraLoraLayer


class Routing:
    """The routing weights seen while recording.

    weights: module name -> list with one float32 tensor [..., E] for each forward pass, detached, on its device. A
             pass that gradient checkpointing computes again in the backward pass is not a second one.
    """

    def __init__(self) -> None:
        self.weights: dict[str, list[torch.Tensor]] = {}
        self._tokens: dict[str, list[torch.Tensor]] = {}

    def tokens(self, module: str) -> torch.Tensor:
        """[T, E]: every token of every pass through this module but those that `attention_mask` marks as padding."""
        return torch.cat(self._tokens[module])

    def usage(self) -> dict[str, torch.Tensor]:
        """module name -> [E], each head's mean share of the tokens."""
        return {module: self.tokens(module).mean(0) for module in self.weights}

    def _listen(self, layer: HydraLoraLayer, adapter_name: str, weights: torch.Tensor) -> None:
        # The autograd engine's number of the running backward pass, -1 outside. torch has no public name for it, and
        # checkpointing's recomputation (reentrant or not) shows in nothing else.
        if torch._C._current_graph_task_id() != -1:
            return
        weights = weights.detach()
        self.weights.setdefault(layer.module_name, []).append(weights)
        self._tokens.setdefault(layer.module_name, []).append(layer.router_losses.select(weights))


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Routing]:
    """Record the routing weights of the forward passes inside the `with` block.

        with record_routing(model) as routing:
            model(**batch)
        routing.weights["model.layers.0.mlp.down_proj"][0]  # [batch, sequence, E]

    With several active adapters, their weights follow one another in the order in which they are active.
    Raises ValueError when the model has no HydraLoRA layer.
    """
    layers = [module for module in model.modules() if isinstance(module, HydraLoraLayer)]
    if not layers:
        raise ValueError(f"record_routing: got a {type(model).__name__} without HydraLoRA layers, expected an adapter")
    routing = Routing()
    for layer in layers:
        layer.routing_listeners.append(routing._listen)
    try:
        yield routing
    finally:
        for layer in layers:
            layer.routing_listeners.remove(routing._listen)
