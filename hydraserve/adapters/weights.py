"""An adapter in memory, whatever file format it came from, and the summary that can be had without its weights."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from hydra_kernels import HydraWeights, Layout, SlotCapacity

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
        """
        if not modules:
            raise ValueError("adapter: got no modules, expected at least one")
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

    That is, for each module in the order of its path: path, layout, scaling, and dtype, shape and bytes of each
    tensor. Where it came from (file type, order of keys, training-only settings) does not count.
    """
    digest = hashlib.sha256(b"hydraserve adapter content 1")
    for path in sorted(modules):
        weights = modules[path]
        for text in (path, repr(weights.layout.record()), float(weights.scaling).hex()):
            _update(digest, text.encode())
        for tensor in (weights.a, weights.b, weights.router, weights.bias):
            _update_tensor(digest, tensor)
    return digest.hexdigest()


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


def _update(digest: _Hash, data: bytes | memoryview) -> None:
    """Length first, so that no two sequences of parts give the same stream."""
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _update_tensor(digest: _Hash, tensor: torch.Tensor | None) -> None:
    if tensor is None:
        _update(digest, b"")
        return
    _update(digest, f"{tensor.dtype} {list(tensor.shape)}".encode())
    _update(digest, tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)


def natural_order(paths: Iterable[str]) -> list[str]:
    """Sorted with numbers by value: layers.2 before layers.10."""

    def key(path: str) -> list[tuple[int, int, str]]:
        return [
            (0, int(part), part) if part.isdecimal() and len(part) < 10 else (1, 0, part) for part in path.split(".")
        ]

    return sorted(paths, key=key)
