"""An adapter in memory, whatever file format it came from, and the summary that can be had without its weights."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from hydra_kernels import HydraWeights, Layout, SlotCapacity

from hydraserve.errors import NonFiniteError

__all__ = ["AdapterSummary", "HydraAdapter", "HydraWeights", "Layout", "ModuleSummary", "content_digest"]


class _Module(Protocol):
    """What `HydraWeights` and `ModuleSummary` have in common."""

    @property
    def layout(self) -> Layout: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


class _Sizes(ABC):
    """Properties of an adapter that follow from its modules' layouts."""

    @abstractmethod
    def _modules(self) -> Mapping[str, _Module]:
        """Path of each module -> what is there."""

    @property
    def layouts(self) -> set[Layout]:
        """The different layouts among the modules."""
        return {module.layout for module in self._modules().values()}

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(layout.rank for layout in self.layouts)

    @property
    def heads(self) -> int:
        """The largest number of heads of any module."""
        return max(layout.heads for layout in self.layouts)

    @property
    def uniform(self) -> bool:
        """Whether all modules have the same layout."""
        return len(self.layouts) == 1

    @property
    def capacity(self) -> SlotCapacity:
        """The smallest slot that takes every module of this adapter."""
        return SlotCapacity(
            rows=max(layout.z_rows for layout in self.layouts),
            k=max(layout.k for layout in self.layouts),
            heads=self.heads,
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """Sorted last components of the module paths: ("down_proj", "gate_proj", ...)."""
        return tuple(sorted({path.rpartition(".")[2] for path in self._modules()}))


@dataclass(frozen=True, eq=False)
class HydraAdapter(_Sizes):
    """One adapter: for each adapted linear layer of the base model, its weights.

    format:     the format it was read from: "hydralora", "lora".
    modules:    path of the linear layer in the base model ("model.layers.0.mlp.gate_proj") -> weights.
    base_model: the base model's name as the adapter states it; informal.
    digest:     `content_digest(modules)`: equal for equal content, whatever file it came from.
    source:     the folder it was really read from.

    Two adapters are the same version when their digests are equal.
    """

    format: str
    modules: dict[str, HydraWeights]
    base_model: str | None
    digest: str
    source: Path

    @classmethod
    def of(
        cls,
        modules: Mapping[str, HydraWeights],
        *,
        format: str | None = None,
        base_model: str | None = None,
        source: Path | str = ".",
    ) -> HydraAdapter:
        """An adapter made of `modules` (at least one), with its digest computed.

        format: default "hydralora" where any module has a router, else "lora".

        Raises NonFiniteError for a scaling that the engine, which computes with float32, would take for infinite.
        """
        if not modules:
            raise ValueError("adapter: got no modules, expected at least one")
        for path, weights in modules.items():
            if not abs(weights.scaling) <= torch.finfo(torch.float32).max:  # nor is it a NaN
                raise NonFiniteError(
                    f"scaling of {path}",
                    got=weights.scaling,
                    expected="a number that float32 holds",
                    fix="correct lora_alpha, or the weight that the adapter is composed with",
                )
        if format is None:
            format = "hydralora" if any(w.router is not None for w in modules.values()) else "lora"
        return cls(format, dict(modules), base_model, content_digest(modules), Path(source))

    def _modules(self) -> Mapping[str, _Module]:
        return self.modules

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they were stored."""
        return sum(weights.nbytes for weights in self.modules.values())


@dataclass(frozen=True, slots=True)
class ModuleSummary:
    """Sizes of one module: x [T, in_features] -> delta [T, out_features]; s = `scaling`."""

    in_features: int
    out_features: int
    layout: Layout
    scaling: float
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class AdapterSummary(_Sizes):
    """What can be said of an adapter on disk without reading its weights.

    format:     "hydralora", "lora"; `reason` says how it was recognised.
    modules:    path of the linear layer in the base model -> its sizes.
    base_model: the base model's name as the adapter states it; informal.
    nbytes:     bytes of all weights.
    source:     the folder that the configuration was found in; `weights_file` the file with the tensors.
    note:       how `source` was chosen when it is not the folder that was asked for, else "".
    """

    format: str
    reason: str
    modules: dict[str, ModuleSummary]
    base_model: str | None
    nbytes: int
    source: Path
    weights_file: Path
    note: str = field(default="")

    def _modules(self) -> Mapping[str, _Module]:
        return self.modules

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Names of the weights' types: ("bfloat16",)."""
        return tuple(sorted({str(module.dtype).removeprefix("torch.") for module in self.modules.values()}))


def content_digest(modules: Mapping[str, HydraWeights]) -> str:
    """SHA-256, 64 hexadecimal digits, over everything that decides what the adapter computes.

    That is, for each module in the order of its path: path, layout, scaling, and dtype and shape of each tensor; then
    the bytes of all tensors, in the order of their names ("model.layers.0.mlp.gate_proj.a"). Where it came from (file
    type, order of keys, training-only settings) does not count.
    """
    digest = hashlib.sha256(b"hydraserve adapter content 2")
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(modules):
        weights = modules[path]
        parts = {"a": weights.a, "b": weights.b, "router": weights.router, "bias": weights.bias}
        kinds = (f"{tensor.dtype} {list(tensor.shape)}" if tensor is not None else "" for tensor in parts.values())
        for text in (path, repr(weights.layout.record()), float(weights.scaling).hex(), *kinds):
            # Length first, so that no two sequences of texts give the same stream.
            digest.update(len(text.encode()).to_bytes(8, "little"))
            digest.update(text.encode())
        tensors |= {f"{path}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    for stretch in _stretches(tensors[name] for name in sorted(tensors)):
        digest.update(stretch.numpy().data)
    return digest.hexdigest()


def _stretches(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors' bytes one after another, uint8; those that lie side by side in memory, as a file's do, in one.

    Tensor operations and hashing let go of Python's lock and take it again: hundreds of them would hold up a model
    that runs in another thread of the process.
    """
    first: torch.Tensor | None = None
    length = 0
    for tensor in tensors:
        if not tensor.is_cpu or not tensor.is_contiguous():
            tensor = tensor.detach().to("cpu").contiguous()
        if first is not None and _same_storage(first, tensor) and first.data_ptr() + length == tensor.data_ptr():
            length += tensor.nbytes
            continue
        if first is not None:
            yield _bytes(first, length)
        first, length = tensor, tensor.nbytes
    if first is not None:
        yield _bytes(first, length)


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _bytes(first: torch.Tensor, length: int) -> torch.Tensor:
    """`length` bytes of memory from a contiguous tensor's first element on."""
    start = first.storage_offset() * first.element_size()
    return torch.empty(0, dtype=torch.uint8).set_(first.untyped_storage(), start, (length,), (1,))


def natural_order(paths: Iterable[str]) -> list[str]:
    """Sorted with numbers by value: layers.2 before layers.10."""

    def key(path: str) -> list[tuple[int, int, str]]:
        return [
            (0, int(part), part) if part.isdecimal() and len(part) < 10 else (1, 0, part) for part in path.split(".")
        ]

    return sorted(paths, key=key)
