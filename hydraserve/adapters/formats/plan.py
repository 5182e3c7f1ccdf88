"""What a format makes of a configuration and of the names and shapes of tensors: a plan for each module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from hydra_kernels import HydraWeights, Layout

from hydraserve.adapters.tensors import TensorInfo
from hydraserve.adapters.weights import ModuleSummary
from hydraserve.errors import (
    AdapterFormatError,
    DuplicateModuleError,
    ShapeError,
    UnexpectedTensorError,
    UnsupportedFeatureError,
)

PREFIX = "base_model.model."  # PEFT's wrappers around the base model
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out", "word_embeddings"})
_WITH_ADAPTER_NAME = re.compile(r"\.lora_(?:A|B\d*|route)\.(?P<name>[^.]+)\.weight$")


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """How one module is put together from the file's tensors.

    a:      names of tensors [r, in]: one for all heads, or one for each.
    heads:  names of E tensors [out, r].
    router: name of a tensor [E, in], or None.
    bias:   name of a tensor [E] that is added to the router's logits, or None.
    dtype:  the narrowest type that holds all of them exactly.

    A name may stand in several places.
    """

    layout: Layout
    scaling: float
    in_features: int
    out_features: int
    dtype: torch.dtype
    a: tuple[str, ...]
    heads: tuple[str, ...]
    router: str | None = None
    bias: str | None = None

    def summary(self) -> ModuleSummary:
        return ModuleSummary(self.in_features, self.out_features, self.layout, self.scaling, self.dtype)

    def names(self) -> tuple[str, ...]:
        """Of all the tensors it takes."""
        return (*self.a, *(name for name in (self.router, self.bias) if name), *self.heads)

    def build(self, tensors: Mapping[str, torch.Tensor]) -> HydraWeights:
        """The module's weights."""
        taken = {name: tensors[name].to(self.dtype) for name in self.names()}
        return HydraWeights(
            a=self._a(taken),
            b=self._b(taken),
            layout=self.layout,
            router=self._router(taken),
            bias=None if self.bias is None else taken[self.bias],
            scaling=self.scaling,
        )

    def _a(self, taken: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return taken[self.a[0]] if len(self.a) == 1 else torch.cat([taken[name] for name in self.a])

    def _b(self, taken: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([taken[name] for name in self.heads])

    def _router(self, taken: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        return None if self.router is None else taken[self.router]


@dataclass(frozen=True, slots=True)
class StackedPlan(ModulePlan):
    """A plan whose `a` and `heads` name one tensor each: A [r, in] or [E, r, in], B [E, out, r].

    transposed: A is [in, r] or [E, in, r], and B [E, r, out].
    """

    transposed: bool = False

    def _a(self, taken: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._turned(taken[self.a[0]]).reshape(-1, self.in_features).contiguous()

    def _b(self, taken: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._turned(taken[self.heads[0]]).contiguous()

    def _turned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(-1, -2) if self.transposed else tensor


def group(infos: Iterable[str], pattern: re.Pattern[str]) -> dict[str, dict[str, str]]:
    """Module path -> {part -> tensor name}, for names that `pattern` matches with its groups `module` and `part`.

    Raises UnsupportedFeatureError, AdapterFormatError or UnexpectedTensorError for a name that it does not match,
    DuplicateModuleError when two names mean the same tensor.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in infos:
        match = pattern.fullmatch(name)
        if match is None or is_unsupported_module(match["module"]):
            refuse_tensor(name)
        parts = modules.setdefault(match["module"].removeprefix(PREFIX), {})
        other = parts.setdefault(match["part"], name)
        if other != name:
            raise DuplicateModuleError(
                match["module"], got=f"both {other} and {name}", expected="one of them", fix="remove one set of tensors"
            )
    return modules


def is_unsupported_module(name: str) -> bool:
    """Whether a tensor belongs to an expert of a mixture-of-experts layer or to an embedding."""
    parts = name.split(".")
    return "experts" in parts or not _EMBEDDINGS.isdisjoint(parts)


def refuse_tensor(name: str) -> NoReturn:
    """Raise the error that says best why a tensor cannot be part of an adapter."""
    parts = name.split(".")
    feature = None
    if "experts" in parts:
        feature = "weights for the experts of a mixture-of-experts layer"
    elif "lora_magnitude_vector" in parts:
        feature = "DoRA (a magnitude for each output)"
    elif "lora_embedding_A" in parts or "lora_embedding_B" in parts or not _EMBEDDINGS.isdisjoint(parts):
        feature = "weights for the embeddings or the output head"
    elif parts[-1] == "bias":
        feature = "a bias"
    elif "modules_to_save" in parts or (parts[-1] == "weight" and not any(p.startswith("lora_") for p in parts)):
        feature = "a full weight matrix of the base model"
    if feature:
        raise UnsupportedFeatureError(
            name, got=feature, expected="low-rank weights of linear layers only", fix="train or export without it"
        )
    if match := _WITH_ADAPTER_NAME.search(name):
        raise AdapterFormatError(
            name,
            got=f"the adapter's name {match['name']!r} inside the tensor's name",
            expected="names as save_pretrained() writes them",
            fix=f"save with save_pretrained(), or remove '.{match['name']}' from the names",
        )
    raise UnexpectedTensorError(
        name, got="a tensor that this format does not know", expected="none", fix="remove it, or check the format"
    )


def matrix(infos: Mapping[str, TensorInfo], name: str) -> tuple[int, int]:
    """Shape of a tensor that must be a matrix. Raises ShapeError."""
    shape = infos[name].shape
    if len(shape) != 2 or 0 in shape:
        raise ShapeError(name, got=f"shape {list(shape)}", expected="a matrix", fix="export the adapter again")
    return shape[0], shape[1]


def widest(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> torch.dtype:
    """The narrowest type that holds tensors of all these types exactly."""
    dtypes = [infos[name].dtype for name in names]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result
