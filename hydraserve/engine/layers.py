"""vLLM's LoRA layers with router and heads: the delta goes through `hydra_kernels` instead of its punica ops.

vLLM decides which layer of a model gets which class (`vllm.lora.utils.from_layer` asks each class in turn);
ours are subclasses of its own, asked first, and only change how adapters are held and how the delta is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from hydra_kernels import HydraWeights, Layout, SlotCapacity, make_slots
from vllm.config.lora import LoRAConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearVariableSliceWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)

if TYPE_CHECKING:
    from hydraserve.engine.punica import PunicaWrapper

_capacity: ContextVar[SlotCapacity] = ContextVar("capacity")


@contextmanager
def slot_capacity(capacity: SlotCapacity) -> Iterator[None]:
    """Layers made inside this context get slots of this capacity."""
    token = _capacity.set(capacity)
    try:
        yield
    finally:
        _capacity.reset(token)


def carried_heads() -> int:
    """Heads that the step's buffer of shared logits must have for the layers made in this context; 0 outside one."""
    capacity = _capacity.get(None)
    return 0 if capacity is None else capacity.heads


@dataclass
class ModuleWeights:
    """What a `LoRAModel` holds for one module: one HydraWeights (or None: not adapted) for each packed part."""

    parts: list[HydraWeights | None]

    @property
    def lora_a(self) -> list[HydraWeights | None]:
        """Handed to `set_lora` by vLLM's manager as it stands."""
        return self.parts

    @property
    def lora_b(self) -> None:
        return None


def resolved_dtype(lora_config: LoRAConfig) -> torch.dtype:
    """The dtype of adapters in the engine: vLLM's configuration names one only before it is verified."""
    dtype = lora_config.lora_dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


class HydraLinear(BaseLayerWithLoRA):
    """Mixed in before one of vLLM's linear LoRA layers."""

    punica_wrapper: PunicaWrapper  # type: ignore[assignment]
    output_slices: tuple[int, ...]

    def create_lora_weights(self, max_loras: int, lora_config: LoRAConfig, model_config: Any = None) -> None:
        self.lora_config = lora_config
        if self.n_slices == 1:
            self.output_slices = (self.output_size,)
        self._capacity = _capacity.get()
        dtype = resolved_dtype(lora_config)
        self.slots = make_slots(max_loras, self.input_size, self._slot_slices(), self._capacity, dtype, self.device)

        def shape_only(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        # vLLM reads input, output and slice sizes from the shapes of these; they hold nothing.
        rank = lora_config.max_lora_rank
        self.lora_a_stacked = tuple(shape_only(max_loras, 1, rank, self.input_size) for _ in self.output_slices)
        self.lora_b_stacked = tuple(shape_only(max_loras, 1, out, rank) for out in self.output_slices)

    def check(self, parts: Sequence[HydraWeights | None]) -> None:
        """Raises ValueError when weights, as they are before ranks take their parts, have not this layer's sizes."""
        in_features, slices = int(self.base_layer.input_size), list(self._whole_slices())
        for part in parts:
            out_features = slices.pop(0) if slices else 0
            while part is not None and out_features < part.out_features and slices:  # see `_split_parts`
                out_features += slices.pop(0)
            if part is not None and (part.in_features, part.out_features) != (in_features, out_features):
                raise ValueError(
                    f"{part.in_features} inputs and {part.out_features} outputs for {in_features} and {out_features}"
                )

    def _whole_slices(self) -> Sequence[int]:
        """Output sizes of the slices, of all ranks together."""
        sizes = getattr(self.base_layer, "output_sizes", None) or [self.base_layer.output_size]
        # Where ranks share heads of K and V, vLLM counts those once for each rank.
        replicas = getattr(self.base_layer, "num_kv_head_replicas", 1)
        return [size if i == 0 else size // replicas for i, size in enumerate(sizes)]

    def _slot_slices(self) -> Sequence[int]:
        """Output sizes of the slots' slices on this rank."""
        return self.output_slices

    def reset_lora(self, index: int) -> None:
        self.slots.clear(index)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any = None) -> None:
        """Put an adapter into slot `index`: the parts of a `ModuleWeights`.

        vLLM's own warm-up adapters (zeros, as plain tensors) are replaced by zeros of the largest layout, so that
        profiling and graph capture see the whole of the work, the gate included.
        """
        if lora_b is not None:
            self.slots.load(index, self._warmup_weights())
            return
        parts = self._split_parts(lora_a)
        self.slots.load(index, [None if p is None else self._shard(p, i) for i, p in enumerate(parts)])

    def _warmup_weights(self) -> list[HydraWeights]:
        cap = self._capacity
        heads = min(cap.heads, cap.k, max(1, cap.rows - 1))
        layout = Layout(max(1, min(cap.k // heads, cap.rows - heads)), heads, has_router=heads > 1)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=self.slots.dtype, device="cpu")

        return [
            HydraWeights(
                a=zeros(layout.a_rows, self.input_size),
                b=zeros(heads, out, layout.rank),
                router=zeros(heads, self.input_size) if heads > 1 else None,
                layout=layout,
            )
            for out in self._slot_slices()
        ]

    def _split_parts(self, parts: list[HydraWeights | None]) -> list[HydraWeights | None]:
        """One part for each slice: a part that covers several slices (a fused projection) is cut."""
        sizes = list(getattr(self, "output_sizes", None) or self.output_slices)
        if len(parts) == len(sizes) or self.n_slices == 1:
            return parts
        result: list[HydraWeights | None] = []
        for part in parts:
            if part is None:
                result += [None] * (len(sizes) - len(result))  # as vLLM: only a trailing part may be missing
                continue
            start = 0
            while start < part.out_features:
                size = sizes[len(result)]
                result.append(part.shard(rows=slice(start, start + size)))
                start += size
        return result

    def _shard(self, weights: HydraWeights, index: int) -> HydraWeights:
        """This rank's part of slice `index`: vLLM's own cut of B's rows, [A; R] whole."""
        if self.tp_size == 1:
            return weights
        b = weights.b.transpose(0, 1)  # [out, E, r]: rows first, as slice_lora_b expects
        if self.n_slices == 1:
            cut: torch.Tensor | None = self.slice_lora_b(b)
        else:
            cut = self.slice_lora_b([b if i == index else None for i in range(self.n_slices)])[index]
        assert cut is not None
        return replace(weights, b=cut.transpose(0, 1).contiguous())

    def forward(self, input_: torch.Tensor) -> Any:
        # Without an adapter in the batch the base layer runs as if LoRA were off. Compiled and captured code
        # cannot branch here; there the op itself looks at the metadata.
        if not torch.compiler.is_compiling() and not self.punica_wrapper.step.active:
            return self.base_layer(input_)
        return super().forward(input_)

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        # vLLM's Transformers backend passes [1, tokens, features].
        self._add_delta(output.view(-1, output.shape[-1]), x.reshape(-1, x.shape[-1]))
        return output

    def _add_delta(self, y: torch.Tensor, x: torch.Tensor) -> None:
        self.slots.linear_(y, x, self.punica_wrapper.step)


class HydraColumnParallelLinear(HydraLinear, ColumnParallelLinearWithLoRA):
    pass


class HydraMergedColumnParallelLinear(HydraLinear, MergedColumnParallelLinearWithLoRA):
    pass


class HydraMergedColumnParallelLinearVariableSlice(HydraLinear, MergedColumnParallelLinearVariableSliceWithLoRA):
    pass


class HydraQKVParallelLinear(HydraLinear, QKVParallelLinearWithLoRA):
    pass


class HydraMergedQKVParallelLinear(HydraLinear, MergedQKVParallelLinearWithLoRA):
    pass


class HydraReplicatedLinear(HydraLinear, ReplicatedLinearWithLoRA):
    def _shard(self, weights: HydraWeights, index: int) -> HydraWeights:
        return weights


class HydraRowParallelLinear(HydraLinear, RowParallelLinearWithLoRA):
    """Input columns are split over ranks, so each rank's z is a partial sum.

    The softmax is not linear: z is all-reduced before the gate. The layer's output is a partial sum too, reduced
    later; so that the delta is counted once, each rank adds only its share of the output rows.
    """

    def _share(self) -> tuple[int, int]:
        """This rank's rows of the output."""
        size = int(self.output_size)
        return size * self.tp_rank // self.tp_size, size * (self.tp_rank + 1) // self.tp_size

    def _slot_slices(self) -> Sequence[int]:
        start, end = self._share()
        return (end - start,)

    def _shard(self, weights: HydraWeights, index: int) -> HydraWeights:
        if self.tp_size == 1:
            return weights
        first = self.tp_rank * self.input_size
        return weights.shard(columns=slice(first, first + self.input_size), rows=slice(*self._share()))

    def _add_delta(self, y: torch.Tensor, x: torch.Tensor) -> None:
        step = self.punica_wrapper.step
        if self.tp_size == 1:
            self.slots.linear_(y, x, step)
            return
        z = tensor_model_parallel_all_reduce(self.slots.shrink(x, step))
        start, end = self._share()
        self.slots.expand_(y[:, start:end], z, step)


LAYER_CLASSES: tuple[type[BaseLayerWithLoRA], ...] = (
    HydraColumnParallelLinear,
    HydraMergedColumnParallelLinear,
    HydraQKVParallelLinear,
    HydraMergedQKVParallelLinear,
    HydraMergedColumnParallelLinearVariableSlice,
    HydraRowParallelLinear,
    HydraReplicatedLinear,
)
