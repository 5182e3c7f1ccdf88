"""The family of HydraLoRA, format by format: layers in plain PyTorch, written from each format's semantics, and the
folders that training would have left of them. Independent of the code under test.

A layer's forward is the delta that it adds to a linear layer, x [..., in] -> [..., out]. The names of its parameters
are those in the format's file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[int, int]]


@dataclass
class Member:
    """An adapter: the format that must recognise it, its configuration, and one layer for each adapted module."""

    format: str
    config: dict[str, Any]
    layers: dict[str, nn.Module]
    prefix: str = PREFIX
    left_out: str = ""  # what the file's names leave out at the beginning of a path

    def tensors(self) -> dict[str, torch.Tensor]:
        """As they are in the file; [name, tensor] in the order of the model."""
        return {
            f"{self.prefix}{path.removeprefix(self.left_out)}.{name}": tensor.detach().clone()
            for path, layer in self.layers.items()
            for name, tensor in layer.state_dict().items()
        }

    def write(self, folder: Path) -> Path:
        """The adapter's folder, as safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        safetensors.torch.save_file(self.tensors(), folder / "adapter_model.safetensors")
        return folder

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """The model's linear layers with these deltas added."""
        handles = []
        for path, layer in self.layers.items():

            def add(_module: nn.Module, args: Any, output: torch.Tensor, layer: nn.Module = layer) -> torch.Tensor:
                return output + layer(args[0])

            handles.append(model.get_submodule(path).register_forward_hook(add))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def fill(layer: nn.Module, seed: int, scaling: float) -> None:
    """Random parameters of a trained adapter's order of size: B does something, routers really choose."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            std = 0.5
        elif "rout" in name or "moe_gate.weight" in name:
            std = 8 * parameter.shape[-1] ** -0.5
        elif "_A" in name:
            std = max(parameter.shape) ** -0.5
        else:
            std = 0.5 / (scaling * min(parameter.shape[-2:]) ** 0.5)
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def linear(n_in: int, n_out: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=bias)


class Hydra(nn.Module):
    """The authors': one A, a softmax over all heads."""

    def __init__(self, n_in: int, n_out: int, rank: int, heads: int, scaling: float, bias: bool = False) -> None:
        super().__init__()
        self.scaling, self.heads = scaling, heads
        self.lora_route, self.lora_A = linear(n_in, heads, bias), linear(n_in, rank)
        for i in range(heads):
            self.add_module(f"lora_B{i}", linear(rank, n_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.lora_route(x), dim=-1)
        parts = [weights[..., i, None] * getattr(self, f"lora_B{i}")(self.lora_A(x)) for i in range(self.heads)]
        return self.scaling * torch.stack(parts).sum(0)


class LoraMoe(nn.Module):
    """LoRAMoE: one A for each head."""

    def __init__(self, n_in: int, n_out: int, rank: int, heads: int, scaling: float) -> None:
        super().__init__()
        self.scaling, self.heads = scaling, heads
        self.lora_route = linear(n_in, self.rows)
        for i in range(heads):
            self.add_module(f"lora_A{i}", linear(n_in, rank))
            self.add_module(f"lora_B{i}", linear(rank, n_out))

    @property
    def rows(self) -> int:
        return self.heads

    def head(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return getattr(self, f"lora_B{i}")(getattr(self, f"lora_A{i}")(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.lora_route(x), dim=-1)
        return self.scaling * torch.stack([weights[..., i, None] * self.head(x, i) for i in range(self.heads)]).sum(0)


class Lease(LoraMoe):
    """HydraFed-LEASE: the k largest weights, scaled to sum to one; all heads may have the same A."""

    def __init__(self, *sizes: Any, k: int, tied: bool) -> None:
        super().__init__(*sizes)
        self.k, self.tied = k, tied

    def tie(self) -> None:
        for i in range(1, self.heads):
            getattr(self, f"lora_A{i}").weight.data.copy_(self.lora_A0.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = torch.topk(torch.softmax(self.lora_route(x), dim=-1), self.k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        result = torch.zeros_like(self.head(x, 0))
        for i in range(self.heads):
            weight = (weights * (chosen == i)).sum(dim=-1, keepdim=True)
            result = result + weight * self.head(x, i) * self.scaling
        return result


class AdaptiveLease(LoraMoe):
    """HydraFed-LEASE's adaptive routing: 2E - 1 rows, those beyond E stand for one's own head `idx`."""

    idx = 1

    @property
    def rows(self) -> int:
        return 2 * self.heads - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = torch.topk(torch.softmax(self.lora_route(x), dim=-1), self.heads, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        chosen = torch.where(chosen >= self.heads, self.idx, chosen)
        result = torch.zeros_like(self.head(x, 0))
        for i in range(self.heads):
            result = result + (weights * (chosen == i)).sum(dim=-1, keepdim=True) * self.head(x, i) * self.scaling
        return result


class Expert(nn.Module):
    """Ordinary LoRA."""

    def __init__(self, n_in: int, n_out: int, rank: int, scaling: float = 1.0) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scaling = linear(n_in, rank), linear(rank, n_out), scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_B(self.lora_A(x)) * self.scaling


class MoePeft(nn.Module):
    """MoE-PEFT's plug-in mixtures: for each token, the chosen experts one after the other."""

    def __init__(self, n_in: int, n_out: int, rank: int, heads: int, scaling: float, top_k: int) -> None:
        super().__init__()
        self.scaling, self.top_k = scaling, top_k
        self.moe_gate = linear(n_in, heads)
        self.experts = nn.ModuleList(Expert(n_in, n_out, rank) for _ in range(heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = torch.topk(torch.softmax(self.moe_gate(tokens), dim=-1), self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        rows = []
        for token, row_weights, row_chosen in zip(tokens, weights, chosen, strict=True):
            parts = [w * self.experts[int(i)](token) for w, i in zip(row_weights, row_chosen, strict=True)]
            rows.append(self.scaling * torch.stack(parts).sum(0))
        return torch.stack(rows).view(*x.shape[:-1], -1)


class HeadList(nn.Module):
    """The PEFT fork's flat form: heads in a list, and a softmax over the k largest logits."""

    def __init__(self, n_in: int, n_out: int, rank: int, heads: int, scaling: float, k: int | None) -> None:
        super().__init__()
        self.scaling, self.k = scaling, k or heads
        self.lora_A, self.lora_route = linear(n_in, rank), linear(n_in, heads)
        self.lora_B = nn.ModuleList(linear(rank, n_out) for _ in range(heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits, chosen = torch.topk(self.lora_route(x), self.k, dim=-1)
        weights = torch.zeros_like(self.lora_route(x)).scatter_(-1, chosen, torch.softmax(logits, dim=-1))
        down = self.lora_A(x)
        return self.scaling * torch.stack([weights[..., i, None] * b(down) for i, b in enumerate(self.lora_B)]).sum(0)


class Transposed(nn.Module):
    """Transposed and stacked parameters."""

    def __init__(self, n_in: int, n_out: int, rank: int, heads: int, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.lora_A = nn.Parameter(torch.zeros(n_in, rank))
        self.lora_B = nn.Parameter(torch.zeros(heads, rank, n_out))
        self.lora_router = linear(n_in, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.lora_router(x), dim=-1)
        outputs = torch.stack([x @ self.lora_A @ b for b in self.lora_B], dim=-1)  # [..., out, E]
        return self.scaling * (outputs * weights[..., None, :]).sum(-1)


class Stack(nn.Module):
    """A parameter that is called `weight`, for names such as molora_A.weight."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class MoLora(nn.Module):
    """parameter-efficient-moe: one A for each expert, a biased router; top-k masks, and nothing is scaled again."""

    def __init__(self, n_in: int, n_out: int, rank: int, heads: int, scaling: float, top_k: int) -> None:
        super().__init__()
        self.scaling, self.top_k = scaling, top_k
        self.molora_A, self.molora_B = Stack(heads, rank, n_in), Stack(heads, n_out, rank)
        self.molora_router = linear(n_in, heads, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probabilities = torch.softmax(self.molora_router(x), dim=-1)
        threshold = torch.topk(probabilities, self.top_k, dim=-1).values[..., -1:]
        masked = torch.where(probabilities >= threshold, probabilities, 0.0)
        result = torch.zeros(())
        for i, (a, b) in enumerate(zip(self.molora_A.weight, self.molora_B.weight, strict=True)):
            result = result + masked[..., i, None] * (x @ a.T @ b.T)
        return result * self.scaling


class SharedRouterBlock(nn.Module):
    """MLLM-HydraLoRA: what it adds to a feed-forward block; one biased router, on the block's input, for all three
    projections. dense: all heads, otherwise the one with the largest weight."""

    def __init__(self, n_in: int, n_wide: int, rank: int, heads: int, scaling: float, dense: bool) -> None:
        super().__init__()
        self.scaling, self.dense = scaling, dense
        self.router = linear(n_in, heads, bias=True)
        for name, inputs, outputs in (("gate", n_in, n_wide), ("up", n_in, n_wide), ("down", n_wide, n_in)):
            self.register_parameter(f"shared_LoRA_A_{name}", nn.Parameter(torch.zeros(rank, inputs)))
            self.add_module(f"moe_{name}", nn.ModuleList(SharedHead(outputs, rank) for _ in range(heads)))
        self.seen: torch.Tensor | None = None

    def weights(self) -> torch.Tensor:
        assert self.seen is not None
        routing = torch.softmax(self.router(self.seen), dim=-1)
        if self.dense:
            return routing
        return torch.zeros_like(routing).scatter_(-1, routing.argmax(dim=-1, keepdim=True), 1.0)

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What is added to one projection of the block whose input is `seen`."""
        low = x @ getattr(self, f"shared_LoRA_A_{name}").T
        heads = [low @ head.LoRA_B.T * self.scaling for head in getattr(self, f"moe_{name}")]
        return (torch.stack(heads, dim=-1) * self.weights()[..., None, :]).sum(-1)


class SharedHead(nn.Module):
    def __init__(self, n_out: int, rank: int) -> None:
        super().__init__()
        self.LoRA_B = nn.Parameter(torch.zeros(n_out, rank))


@dataclass
class SharedRouterMember:
    """An MLLM-HydraLoRA adapter: ordinary LoRA in attention, and blocks whose projections share a router."""

    attention: Member
    blocks: dict[str, SharedRouterBlock]
    dense: bool
    alpha: int
    format: str = "mllm-hydralora"

    def write(self, folder: Path) -> Path:
        """The adapter's folder; lora_alpha and dense_moe in moe_args.json."""
        self.attention.write(folder)
        tensors = {
            f"{PREFIX}{path}.{name}": tensor.detach().clone()
            for path, block in self.blocks.items()
            for name, tensor in block.state_dict().items()
        }
        torch.save(tensors, folder / "non_lora_trainables.bin")
        (folder / "moe_args.json").write_text(json.dumps({"lora_alpha": self.alpha, "dense_moe": self.dense}))
        return folder

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """As `Member.applied_to`."""
        handles = []
        for path, block in self.blocks.items():

            def see(_module: nn.Module, args: Any, block: SharedRouterBlock = block) -> None:
                block.seen = args[0]

            handles.append(model.get_submodule(path).register_forward_pre_hook(see))
            for name in ("gate", "up", "down"):

                def add(
                    _m: nn.Module, args: Any, y: torch.Tensor, block: SharedRouterBlock = block, name: str = name
                ) -> torch.Tensor:
                    return y + block.delta(name, args[0])

                handles.append(model.get_submodule(f"{path}.{name}_proj").register_forward_hook(add))
        try:
            with self.attention.applied_to(model):
                yield
        finally:
            for handle in handles:
                handle.remove()


def shared_routers(shapes: Shapes, *, dense: bool, seed: int) -> SharedRouterMember:
    """MLLM-HydraLoRA for all feed-forward blocks of `shapes`, and ordinary LoRA for the attention."""
    rank, heads, alpha = 4, 4, 8
    attention = make_member(
        "lora", {p: s for p, s in shapes.items() if "self_attn" in p}, lambda _, i, o, r, s: Expert(i, o, r, s), {},
        rank=rank, alpha=alpha, seed=seed,
    )  # fmt: skip
    blocks = {}
    for path, (n_in, n_wide) in shapes.items():
        if path.endswith("gate_proj"):
            block = SharedRouterBlock(n_in, n_wide, rank, heads, alpha / rank, dense)
            fill(block, 1000 * seed + len(blocks), alpha / rank)
            blocks[path.removesuffix(".gate_proj")] = block
    return SharedRouterMember(attention, blocks, dense, alpha)


COMMON = {"base_model_name_or_path": "org/base", "bias": "none", "task_type": "CAUSAL_LM", "lora_dropout": 0.05}


def make_member(
    format: str,
    shapes: Shapes,
    make: Callable[..., nn.Module],
    config: dict[str, Any],
    *,
    rank: int,
    alpha: float,
    seed: int,
    scaling: float | None = None,
    prefix: str = PREFIX,
) -> Member:
    scaling = alpha / rank if scaling is None else scaling
    layers = {}
    for i, (path, (n_in, n_out)) in enumerate(shapes.items()):
        layers[path] = make(path, n_in, n_out, rank, scaling)
        fill(layers[path], 1000 * seed + i, scaling)
        if isinstance(layers[path], Lease) and layers[path].tied:
            layers[path].tie()
    targets = sorted({path.rpartition(".")[2] for path in shapes})
    config = {**COMMON, "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, **config}
    return Member(format, config, layers, prefix)


def _lease(shapes: Shapes, heads: int, seed: int, *, k: int, tied: bool) -> Member:
    config = {"lora_nums": heads, "k": k, "adaptive": False, "idx": 0, "universal_idx": None, "shared_lora_a": tied}
    return make_member(
        "hydrafed-lease", shapes, lambda _, i, o, r, s: Lease(i, o, r, heads, s, k=k or heads, tied=tied), config,
        rank=4, alpha=8, seed=seed,
    )  # fmt: skip


def _moe_peft(shapes: Shapes, kind: str, seed: int) -> Member:
    """LoRAMoE routes in the feed-forward block and has ordinary LoRA in attention; MoLA routes everywhere."""
    moe_heads, rank = 4, 4

    def make(path: str, n_in: int, n_out: int, rank: int, scaling: float) -> nn.Module:
        if kind == "loramoe" and "self_attn" in path:
            return Expert(n_in, n_out, rank, scaling)
        return MoePeft(n_in, n_out, rank, moe_heads, scaling, top_k=moe_heads if kind == "loramoe" else 2)

    config = {"peft_type": kind.upper(), "routing_strategy": kind, "num_experts": moe_heads, "use_rslora": True}
    if kind == "mola":
        config["top_k"] = 2
    member = make_member("moe-peft", shapes, make, config, rank=rank, alpha=6, seed=seed, scaling=6 / rank**0.5)
    member.prefix, member.left_out = f"{kind}.", "model."
    return member


def family(shapes: Shapes) -> dict[str, Member]:
    """One adapter of each format and way of routing, for the linear layers of `shapes` (path -> (in, out))."""
    e = 4
    members = {
        "hydralora, biased router": make_member(
            "hydralora", shapes, lambda _, i, o, r, s: Hydra(i, o, r, 3, s, bias=True), {"lora_nums": 3},
            rank=4, alpha=8.0, seed=1,
        ),
        "mtlora, its routing off": make_member(
            "hydralora", shapes, lambda _, i, o, r, s: Hydra(i, o, r, 3, s),
            {"lora_nums": 3, "peft_type": "HYDRALORA", "enable_blc": True, "enable_fine_grained_routing": False},
            rank=4, alpha=8.0, seed=2,
        ),
        "loramoe": make_member(
            "loramoe", shapes, lambda _, i, o, r, s: LoraMoe(i, o, r, e, s),
            {"lora_nums": e, "blc_alpha": 0.1, "blc_weight": 0.1}, rank=4, alpha=8.0, seed=3,
        ),
        "lease, tied A, top-2": _lease(shapes, 4, 4, k=2, tied=True),
        "lease, all heads": _lease(shapes, 3, 5, k=0, tied=False),
        "lease, adaptive": make_member(
            "hydrafed-lease", shapes, lambda _, i, o, r, s: AdaptiveLease(i, o, r, 2, s),
            {"lora_nums": 2, "k": 0, "adaptive": True, "idx": AdaptiveLease.idx, "shared_lora_a": False},
            rank=4, alpha=8, seed=6,
        ),
        "moe-peft loramoe": _moe_peft(shapes, "loramoe", 7),
        "moe-peft mola": _moe_peft(shapes, "mola", 8),
        "peft fork": make_member(
            "hydralora-list", shapes, lambda _, i, o, r, s: HeadList(i, o, r, 4, s, None),
            {"peft_type": "HYDRALORA", "lora_num": 4, "use_hydralora_experts": False, "top_k": 1},
            rank=8, alpha=16, seed=9,
        ),
        "peft fork, top-2": make_member(
            "hydralora-list", shapes, lambda _, i, o, r, s: HeadList(i, o, r, 4, s, 2),
            {"peft_type": "HYDRALORA", "lora_num": 4, "head_top_k": 2}, rank=8, alpha=16, seed=10,
        ),
        "transposed": make_member(
            "hydralora-transposed", shapes, lambda _, i, o, r, s: Transposed(i, o, r, 3, s),
            {"expert_num": 3, "routing_strategy": "soft"}, rank=8, alpha=16, seed=11,
        ),
        "molora, top-2": make_member(
            "molora", shapes, lambda _, i, o, r, s: MoLora(i, o, r, 4, s, 2),
            {"peft_type": "MOLORA", "num_experts": 4, "top_k": 2}, rank=4, alpha=16, seed=12,
        ),
    }  # fmt: skip
    return members
