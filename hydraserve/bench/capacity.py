"""How many bytes a base model, its KV cache and adapters take, and what fits into a given memory.

A GPU holds the weights, all slots at full size, and the KV cache; adapters wait in the host's memory. On a CPU
everything is in one memory, and a slot takes what its adapter needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from hydra_kernels import Layout, SlotCapacity

from hydraserve.adapters.sizing import check_targets
from hydraserve.errors import ConfigError

Device = Literal["cpu", "gpu"]

MIB, GIB = 1 << 20, 1 << 30

# Memory of a running server on a CPU beside weights, KV cache and adapters: its three processes with Python, torch and
# vLLM in each, and a compiled model. Measured with vLLM 0.32 on x86-64, see docs/benchmarks.md.
CPU_PROCESSES_BYTES = int(2.25 * GIB)
# The same on a GPU: CUDA context and libraries, CUDA graphs. vLLM's default --gpu-memory-utilization leaves a tenth of
# the memory free beyond that.
GPU_CONTEXT_BYTES = int(1.0 * GIB)
GPU_UTILIZATION = 0.9
# Share of a CPU machine's memory to use when nothing else is said: the rest is the system's.
CPU_UTILIZATION = 0.9


# vLLM's defaults by device: tokens in a block of the KV cache, tokens in a step; and requests in a step.
KV_BLOCK_TOKENS: dict[Device, int] = {"cpu": 128, "gpu": 16}
BATCHED_TOKENS: dict[Device, int] = {"cpu": 2048, "gpu": 8192}
SEQUENCES = 256
# What vLLM assumes of a model whose configuration names no longest request.
CONTEXT = 2048

# Of what is left beside the weights: the most that slots may take, and the most of the host for waiting adapters.
# The KV cache decides how many requests run at once, so it keeps the larger part.
SLOTS_SHARE, HOST_SHARE = 0.25, 0.5

# Layers whose input is split over tensor-parallel ranks; all others split their output.
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "fc2", "c_proj", "wo", "w2")
# Layers that vLLM merges: a slot that stays stacked has room for all of them as soon as one is adapted.
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# How the CPU operator packs (hydra_kernels.ops.cpu): rows of A, columns of A, columns of y; bytes of alignment.
_ROWS, _COLUMNS, _PANEL, _ALIGN = 4, 32, 64, 64
_TABLE_BYTES = 14 * 8


@dataclass(frozen=True)
class BaseSize:
    """A base model. weights: bytes; kv_token: bytes of KV cache for one token; shapes: module path -> (in, out) of
    every linear layer; hidden, intermediate, vocabulary: as in its configuration; context: the longest request."""

    weights: int
    kv_token: int
    shapes: Mapping[str, tuple[int, int]]
    hidden: int
    intermediate: int
    vocabulary: int
    context: int

    @classmethod
    def of(cls, model: str, dtype_bytes: int) -> BaseSize:
        """Read from the configuration, without weights. model: a folder or a Hub id. Raises as `base_shapes`, and
        ModelTooLargeError never: whether it fits is the question."""
        from hydraserve.models import base_shapes
        from hydraserve.models.memory import weight_bytes
        from hydraserve.models.shapes import skeleton

        config = skeleton(model).config
        text = config.get_text_config()
        weights = weight_bytes(model)
        if weights is None:
            raise ConfigError(
                what=f"base model {model}",
                got="a quantised checkpoint that is not on this machine",
                expected="one whose size can be read",
                fix="download it and give the folder",
            )
        if getattr(config, "quantization_config", None) is None:
            weights = weights * dtype_bytes // 2
        return cls(
            weights=weights,
            kv_token=kv_bytes_per_token(config, dtype_bytes),
            shapes={path: shape for path, shape in base_shapes(config).items() if "lm_head" not in path},
            hidden=int(text.hidden_size),
            intermediate=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
            vocabulary=int(text.vocab_size),
            context=context_length(text),
        )


def kv_bytes_per_token(config: Any, dtype_bytes: int, tensor_parallel: int = 1) -> int:
    """Bytes of KV cache for one token on one rank: keys and values of every layer.

    config: of transformers. An upper bound for models whose layers do not all keep every token (sliding windows).
    """
    text = config.get_text_config()
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return 2 * int(text.num_hidden_layers) * max(1, heads // tensor_parallel) * head_dim * dtype_bytes


def context_length(text: Any) -> int:
    """Tokens of the longest request of a model, as vLLM reads them from its (text) configuration."""
    rope = getattr(text, "rope_parameters", None) or {}
    # These kinds have the factor in max_position_embeddings already.
    stretched = rope.get("rope_type") in ("linear", "dynamic")
    return int(getattr(text, "max_position_embeddings", CONTEXT) * (rope.get("factor") or 1 if stretched else 1))


def adapter_bytes(shapes: Iterable[tuple[int, int]], layout: Layout, dtype_bytes: int) -> int:
    """Of one adapter's weights, on disk and in the host's memory, if all layers (in, out) have this layout."""
    return dtype_bytes * sum(layout.z_rows * n_in + layout.k * out for n_in, out in shapes)


def stacked_slot_bytes(
    shapes: Mapping[str, tuple[int, int]], capacity: SlotCapacity, dtype_bytes: int, tensor_parallel: int = 1
) -> int:
    """Of one slot on one GPU: fixed-size tensors at full capacity (hydra_kernels.slots.StackedSlots)."""
    total = 0
    for path, (n_in, out) in shapes.items():
        cut = n_in // tensor_parallel if path.rpartition(".")[2] in ROW_PARALLEL else n_in
        total += dtype_bytes * (capacity.rows * cut + capacity.k * (out // tensor_parallel))
        total += 4 * (8 + capacity.heads)  # layout record and router bias
    return total


def packed_slot_bytes(shapes: Iterable[tuple[int, int]], layout: Layout, dtype_bytes: int) -> int:
    """Of one slot on a CPU that holds an adapter of this layout (hydra_kernels.ops.cpu.PackedSlots)."""
    depth = 2 if dtype_bytes == 2 else 1
    total = 0
    for n_in, out in shapes:
        a = _up(layout.z_rows, _ROWS) * _up(n_in, _COLUMNS) * dtype_bytes
        b = _up(out, _PANEL) * _up(layout.k, depth) * dtype_bytes
        total += _up(a, _ALIGN) + _up(b, _ALIGN) + _TABLE_BYTES
    return total


def with_merged_partners(targets: Iterable[str], shapes: Mapping[str, tuple[int, int]]) -> set[str]:
    """The targets, and the layers that vLLM merges with one of them, as far as the base has them."""
    wanted = set(targets)
    known = {path.rpartition(".")[2] for path in shapes}
    return wanted | {name for group in MERGED if wanted & set(group) for name in group if name in known}


def activation_bytes(base: BaseSize, batched_tokens: int, sequences: int, dtype_bytes: int) -> int:
    """Estimate of the largest working memory of one step: a layer's inputs and outputs, and the logits of one token
    of each sequence in float32 with the copies that sampling makes."""
    layer = batched_tokens * (4 * base.hidden + 3 * base.intermediate) * dtype_bytes
    return layer + sequences * base.vocabulary * (dtype_bytes + 2 * 4)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Wish:
    """What is to be served, and where.

    layout:      of the adapters, all of one size; targets: last name components of their layers, None: all.
    adapters:    how many there are; concurrency: requests that may meet in a batch; slots: None: chosen.
    device:      "gpu": memory is one GPU's, host that of the machine. "cpu": memory is the machine's, host unused.
    max_model_len: tokens of the longest request, None: the base model's context.
    dtype:       of the engine, None: the model's own, of 16 bits. utilization: share of `memory` that may be used.
    """

    layout: Layout
    adapters: int
    device: Device
    memory: int
    host: int
    concurrency: int = 64
    slots: int | None = None
    targets: tuple[str, ...] | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    tensor_parallel: int = 1
    utilization: float = GPU_UTILIZATION

    @property
    def dtype_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class MemoryPlan:
    """What fits. All sizes in bytes, of one device; see the properties.

    Raises ConfigError for layers or a context that the base does not have, and for tensor parallel on a CPU.
    """

    base: BaseSize
    wish: Wish

    def __post_init__(self) -> None:
        check_targets(self.wish.targets or (), self.base.shapes)
        if self.wish.device == "cpu" and self.wish.tensor_parallel > 1:
            raise ConfigError(
                what="--tensor-parallel-size",
                got=f"{self.wish.tensor_parallel} on a CPU, where the ranks share one memory",
                expected="1: what several ranks take there is not planned",
                fix="leave it out; --device gpu plans for GPUs",
            )
        if self.max_model_len > self.base.context:
            raise ConfigError(
                what="--max-model-len",
                got=self.max_model_len,
                expected=f"at most {self.base.context}, the base model's context, beyond which vLLM does not start",
                fix="lower it, or leave it out for the whole context",
            )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The adapted layers."""
        targets = self.wish.targets
        return {p: s for p, s in self.base.shapes.items() if targets is None or p.rpartition(".")[2] in targets}

    @cached_property
    def adapter(self) -> int:
        """One adapter, in one process."""
        return adapter_bytes(self.shapes.values(), self.wish.layout, self.wish.dtype_bytes)

    @cached_property
    def slot(self) -> int:
        """One slot."""
        wish = self.wish
        if wish.device == "cpu":
            return packed_slot_bytes(self.shapes.values(), wish.layout, wish.dtype_bytes)
        targets = with_merged_partners((path.rpartition(".")[2] for path in self.shapes), self.base.shapes)
        stacked = {p: s for p, s in self.base.shapes.items() if p.rpartition(".")[2] in targets}
        return stacked_slot_bytes(stacked, self.capacity, wish.dtype_bytes, wish.tensor_parallel)

    @property
    def capacity(self) -> SlotCapacity:
        """Of the slots, as the suggested flags give it."""
        layout = self.wish.layout
        return SlotCapacity(layout.rank + layout.heads, layout.k, layout.heads)

    @property
    def weights(self) -> int:
        return self.base.weights // self.wish.tensor_parallel

    @property
    def overhead(self) -> int:
        """Everything beside weights, slots, waiting adapters and KV cache. An estimate."""
        wish = self.wish
        fixed = CPU_PROCESSES_BYTES if wish.device == "cpu" else GPU_CONTEXT_BYTES
        return fixed + activation_bytes(self.base, BATCHED_TOKENS[wish.device], SEQUENCES, wish.dtype_bytes)

    @cached_property
    def left(self) -> int:
        """What slots and KV cache (on a CPU: and waiting adapters) have to share; not positive: nothing fits."""
        return int(self.wish.memory * self.wish.utilization) - self.weights - self.overhead

    @cached_property
    def slots(self) -> int:
        """As asked; else as many as can meet in a batch, within SLOTS_SHARE of what is left, and at least one."""
        if self.wish.slots is not None:
            return self.wish.slots
        fitting = int(max(0, self.left) * SLOTS_SHARE) // max(1, self.slot)
        return max(1, min(self.wish.adapters, self.wish.concurrency, fitting))

    @cached_property
    def max_adapters(self) -> int:
        """Adapters that wait in the host's memory, within HOST_SHARE of it; the others are read when asked for."""
        room = self.left if self.wish.device == "cpu" else self.wish.host
        fitting = int(max(0, room) * HOST_SHARE) // max(1, self.waiting)
        return max(self.slots, min(self.wish.adapters, fitting))

    @property
    def waiting(self) -> int:
        """One adapter in the host's memory: each rank's process keeps its own copy, whole."""
        return self.adapter * self.wish.tensor_parallel

    @property
    def host_cache(self) -> int:
        return self.max_adapters * self.waiting

    @property
    def kv_cache(self) -> int:
        """What is left for the KV cache; negative: it does not fit."""
        waiting = self.host_cache if self.wish.device == "cpu" else 0
        return self.left - self.slots * self.slot - waiting

    @property
    def kv_token(self) -> int:
        return max(1, self.base.kv_token // self.wish.tensor_parallel)

    @property
    def kv_tokens(self) -> int:
        """Whole blocks of vLLM's default size."""
        block = KV_BLOCK_TOKENS[self.wish.device]
        return max(0, self.kv_cache) // (self.kv_token * block) * block

    @property
    def max_model_len(self) -> int:
        return self.wish.max_model_len or self.base.context

    @property
    def requests(self) -> float:
        """How many of the longest requests the KV cache holds at one time. vLLM does not start for less than one."""
        return self.kv_tokens / self.max_model_len

    @property
    def fits(self) -> bool:
        return self.requests >= 1

    @property
    def total(self) -> int:
        """What the server takes altogether, of the memory that it serves from."""
        waiting = self.host_cache if self.wish.device == "cpu" else 0
        return self.weights + self.overhead + self.slots * self.slot + waiting + max(0, self.kv_cache)

    def flags(self) -> list[str]:
        """Of `hydraserve serve`, beside --model and --adapter."""
        layout = self.wish.layout
        flags = ["--slots", str(self.slots), "--max-adapters", str(self.max_adapters)]
        flags += ["--max-rank", str(layout.rank), "--max-heads", str(layout.heads)]
        if self.wish.max_model_len is not None:
            flags += ["--max-model-len", str(self.wish.max_model_len)]
        if self.wish.targets is not None:
            flags += ["--target-modules", ",".join(self.wish.targets)]
        if self.wish.dtype is not None:
            flags += ["--dtype", self.wish.dtype]
        if self.wish.tensor_parallel > 1:
            flags += ["--tensor-parallel-size", str(self.wish.tensor_parallel)]
        if self.wish.device == "cpu":
            # In bytes, because vLLM's own choice on a CPU is made before any adapter is loaded.
            return [*flags, "--kv-cache-memory-bytes", str(max(0, self.kv_cache))]
        return [*flags, "--gpu-memory-utilization", f"{self.wish.utilization:g}"]
