"""The adapted linear layer: one A, E heads B and a router for each adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn

from hydraserve.tuner.config import HydraLoraConfig
from hydraserve.tuner.errors import MergeError
from hydraserve.tuner.losses import RouterLosses

# Called with the layer, the adapter's name and the routing weights [..., E] of each forward pass.
RoutingListener = Callable[["HydraLoraLayer", str, torch.Tensor], None]


class HydraLoraHeads(nn.Module):
    """The matrices B of one adapter. weight: [E, out, r]."""

    def __init__(self, num_heads: int, rank: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, out_features, rank))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """sum_i B_i h_i, [..., out], for h [..., E, r]: one product with inner size E*r."""
        return nn.functional.linear(h.flatten(-2), self.weight.transpose(0, 1).flatten(1))


class AdapterParts(NamedTuple):
    """The modules of one adapter in one layer."""

    a: nn.Linear
    b: HydraLoraHeads
    router: nn.Linear
    dropout: nn.Module


class HydraLoraLayer(BaseTunerLayer):
    """What every adapted layer holds, by adapter name.

    hydralora_A:      nn.Linear, weight [r, in].
    hydralora_B:      `HydraLoraHeads`, weight [E, out, r].
    hydralora_router: nn.Linear without bias, weight [E, in].
    """

    adapter_layer_names = ("hydralora_A", "hydralora_B", "hydralora_router")
    other_param_names = ("r", "num_heads", "scaling", "configs", "hydralora_dropout")

    training: bool  # nn.Module's, which subclasses inherit as well

    def __init__(self, base_layer: nn.Module, module_name: str, losses: RouterLosses) -> None:
        self.base_layer = base_layer
        self.module_name = module_name
        self.router_losses = losses
        sizes = cast(tuple[int, int], _get_in_out_features(self.get_base_layer()))
        self.in_features, self.out_features = sizes
        self.r: dict[str, int] = {}
        self.num_heads: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.configs: dict[str, HydraLoraConfig] = {}
        self.hydralora_dropout = nn.ModuleDict()
        self.hydralora_A = nn.ModuleDict()
        self.hydralora_B = nn.ModuleDict()
        self.hydralora_router = nn.ModuleDict()
        self.routing_listeners: list[RoutingListener] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: HydraLoraConfig) -> None:
        """Add an adapter to this layer."""
        rank, heads = config.rank_of(self.module_name), config.heads_of(self.module_name)
        self.r[adapter_name], self.num_heads[adapter_name] = rank, heads
        self.scaling[adapter_name] = config.scaling_of(self.module_name)
        self.configs[adapter_name] = config
        self.hydralora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.hydralora_A[adapter_name] = nn.Linear(self.in_features, rank, bias=False)
        self.hydralora_B[adapter_name] = HydraLoraHeads(heads, rank, self.out_features)
        self.hydralora_router[adapter_name] = nn.Linear(self.in_features, heads, bias=False)
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def parts(self, adapter_name: str) -> AdapterParts:
        """The modules of an adapter. Raises KeyError when this layer does not have it."""
        return AdapterParts(
            a=cast(nn.Linear, self.hydralora_A[adapter_name]),
            b=cast(HydraLoraHeads, self.hydralora_B[adapter_name]),
            router=cast(nn.Linear, self.hydralora_router[adapter_name]),
            dropout=self.hydralora_dropout[adapter_name],
        )

    def reset_parameters(self, adapter_name: str, zero_delta: bool = True) -> None:
        """As the authors' layer: A and the router uniform (kaiming, a = sqrt 5), every B zero."""
        a, b, router, _ = self.parts(adapter_name)
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(router.weight, a=math.sqrt(5))
        nn.init.zeros_(b.weight)
        if not zero_delta:
            with torch.no_grad():
                for head in b.weight:
                    nn.init.kaiming_uniform_(head, a=math.sqrt(5))

    def delta(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """s * sum_i w_i * B_i A x, [..., out], for x [..., in], in the dtype of the adapter's weights.

        The softmax is in float32. Unlike the authors' code, A x is computed once (so dropout draws one mask for
        all heads, not one for each) and the heads are summed in one product.
        """
        a, b, router, dropout = self.parts(adapter_name)
        x = self._cast_input_dtype(x, a.weight.dtype)
        logits = router(x)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
        config = self.configs[adapter_name]
        if torch.is_grad_enabled() and self.training and (config.load_balance_coef or config.router_z_coef):
            weights = self.router_losses.attach(weights, logits, config)
        for listener in self.routing_listeners:
            listener(self, adapter_name, weights)
        u = self.scaling[adapter_name] * a(dropout(x))
        h = weights.to(u.dtype).unsqueeze(-1) * u.unsqueeze(-2)  # [..., E, r]
        return cast(torch.Tensor, b(h))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises MergeError: there is no single matrix to merge."""
        raise MergeError.new()

    def unmerge(self) -> None:
        """Raises MergeError: nothing can have been merged."""
        raise MergeError.new()


class HydraLoraLinear(nn.Module, HydraLoraLayer):
    """A linear layer, quantised or not, with HydraLoRA adapters: y = base(x) + the active adapters' deltas."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: HydraLoraConfig,
        module_name: str,
        losses: RouterLosses,
    ) -> None:
        super().__init__()
        HydraLoraLayer.__init__(self, base_layer, module_name, losses)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.hydralora_A:
                result = result + self.delta(x, name).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return f"hydralora.{super().__repr__()}"
