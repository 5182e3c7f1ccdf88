"""Adapters composed from others: a weighted sum of ordinary LoRA adapters, or a mixture of them under a router.

    sum     y = W x + sum_i weight_i s_i B_i A_i x         one LoRA whose rank is the sum of theirs
    routed  y = W x + sum_i w_i weight_i s_i B_i A_i x     w = softmax of the router's logits for x; one A for each head

A sum of one adapter is that adapter, scaled; it may then be of any kind. The result is an adapter like any other, with
a digest of its own; what happens to its parts later does not change it.

Exact: A, B and the routers stay as they are, side by side, padded with zeros where ranks differ. Only where weight * s
differs between the parts of a module is B multiplied by the ratio, in float32 (no rounding for powers of two).

Asked for by vllm-project/vllm#51940 (sums) and #49705 (routed).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hydra_kernels import HydraWeights, Layout

from hydraserve.adapters.config import AdapterConfig, read_config
from hydraserve.adapters.formats.plan import PREFIX
from hydraserve.adapters.limits import DEFAULT_LIMITS, AdapterLimits
from hydraserve.adapters.sources.policy import SourcePolicy, split_scheme
from hydraserve.adapters.tensors import open_tensors
from hydraserve.adapters.validate import check_finite, check_gathered
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import (
    AdapterConfigError,
    DuplicateModuleError,
    LimitError,
    MissingTensorError,
    ShapeError,
    SourceForbiddenError,
    UnexpectedTensorError,
    UnsupportedFeatureError,
)

ROUTER_NAME = "router.safetensors"
ROUTER_CONFIG_NAME = "router_config.json"
FORMAT = "composed"
_SCHEME = "compose:"


@dataclass(frozen=True)
class Recipe:
    """What to compose. parts: (adapter's name, weight). router: where the router's folder comes from, or None."""

    parts: tuple[tuple[str, float], ...]
    router: str | None = None

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parts]
        if not names or len(set(names)) < len(names):
            raise AdapterConfigError(
                "compose", got=names, expected="one or more different adapters", fix="name each once"
            )
        for name, weight in self.parts:
            if not math.isfinite(weight) or weight == 0:
                raise AdapterConfigError(
                    f"weight of {name}",
                    got=weight,
                    expected="a finite number other than 0",
                    fix="leave the adapter out",
                )

    @property
    def source(self) -> str:
        """As one line of text; `parse` reads it."""
        text = json.dumps({"parts": self.parts, "router": self.router}, separators=(",", ":"))
        return f"{_SCHEME}{text}"

    @classmethod
    def parse(cls, source: str) -> Recipe | None:
        """The recipe that has this `source`; None for the source of something else."""
        if not source.startswith(_SCHEME):
            return None
        try:
            content = json.loads(source.removeprefix(_SCHEME))
            parts = tuple((str(name), float(weight)) for name, weight in content["parts"])
            router = content["router"]
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterConfigError(
                "source", got=source, expected="what a composed adapter has as its source", fix="compose it again"
            ) from error
        return cls(parts, None if router is None else str(router))

    def __str__(self) -> str:
        terms = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in self.parts)
        return f"{terms} under the router {self.router}" if self.router else terms


@dataclass(frozen=True)
class RouterFile:
    """The routers of a mixture. routers: module path -> (router [E, in], bias [E] or None). top_k, renormalize: as in
    `hydra_kernels.Layout`."""

    routers: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]
    top_k: int = 0
    renormalize: bool = True


def read_router(folder: Path, limits: AdapterLimits = DEFAULT_LIMITS) -> RouterFile:
    """Read `router.safetensors`: {module}.router.weight [E, in] and, where there is one, {module}.router.bias [E].

    `router_config.json` beside it may say {"top_k": k, "renormalize": true or false}; without it, all heads count.

    Raises AdapterError's subclasses.
    """
    config_path = folder / ROUTER_CONFIG_NAME
    config = read_config(config_path, limits) if config_path.exists() else AdapterConfig({}, limits)
    file = open_tensors(folder / ROUTER_NAME, limits)
    check_gathered(file.infos)
    biases: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in file.load().items():
        check_finite(name, tensor)
        module, _, part = name.removeprefix(PREFIX).rpartition(".router.")
        if not module or part not in ("weight", "bias"):
            raise UnexpectedTensorError(name, got="a tensor that is no router's", expected="{module}.router.weight")
        tensors = weights if part == "weight" else biases
        if module in tensors:
            raise DuplicateModuleError(
                f"{module}.router.{part}", got="two such tensors, with and without a prefix", expected="one of them"
            )
        tensors[module] = tensor
    if alone := sorted(set(biases) - set(weights)):
        raise MissingTensorError(f"{alone[0]}.router.weight", got="only its bias", expected="the router")
    routers = {module: (router, biases.get(module)) for module, router in weights.items()}
    return RouterFile(routers, config.whole("top_k"), config.flag("renormalize", True))


def router_folder(source: str, policy: SourcePolicy) -> Path:
    """The folder of a router on this machine, if it lies below the allowed ones. Raises SourceForbiddenError."""
    scheme, path = split_scheme(source)
    if scheme:
        raise SourceForbiddenError(
            "router", got=f"{scheme}://", expected="a folder of this machine", fix="download the router first"
        )
    folder = policy.check_path(Path(path))
    for name in (ROUTER_NAME, ROUTER_CONFIG_NAME):
        policy.check_path(folder / name)
    return folder


def compose(
    parts: Sequence[tuple[HydraAdapter, float]],
    router: RouterFile | None = None,
    limits: AdapterLimits = DEFAULT_LIMITS,
) -> HydraAdapter:
    """The adapter that adds up `parts` (adapter, weight), or mixes them as `router` says.

    Modules are those of any part. A part that does not adapt a module adds nothing there; under a router it is a head
    of zeros, so that the others keep their weights.

    Raises UnsupportedFeatureError for a part with several heads, where there is more than one part; LimitError when
    the ranks of a module add up to more than an adapter may have; MissingTensorError, UnexpectedTensorError or
    ShapeError when the routers are not those of these adapters.
    """
    if router is None and len(parts) == 1:
        adapter, weight = parts[0]
        modules = {path: replace(w, scaling=w.scaling * weight) for path, w in adapter.modules.items()}
    else:
        paths = list(dict.fromkeys(path for adapter, _ in parts for path in adapter.modules))
        if router is not None:
            _check_routers(router, paths)
        modules = {path: _module(path, _weighted(path, parts), router, limits) for path in paths}
    bases = {adapter.base_model for adapter, _ in parts}
    return HydraAdapter.of(modules, format=FORMAT, base_model=bases.pop() if len(bases) == 1 else None)


def _weighted(path: str, parts: Sequence[tuple[HydraAdapter, float]]) -> list[HydraWeights | None]:
    """One module of each part, with the part's weight in its scaling."""
    found: list[HydraWeights | None] = []
    for adapter, weight in parts:
        weights = adapter.modules.get(path)
        if weights is not None and weights.layout.heads != 1:
            raise UnsupportedFeatureError(
                f"module {path}",
                got=f"{weights.layout.heads} heads in an adapter to be composed",
                expected="ordinary LoRA: a sum or a mixture of mixtures is none itself",
                fix="compose ordinary LoRA adapters, or scale this one alone",
            )
        found.append(None if weights is None else replace(weights, scaling=weights.scaling * weight))
    return found


def _module(
    path: str, parts: list[HydraWeights | None], router: RouterFile | None, limits: AdapterLimits
) -> HydraWeights:
    present = [part for part in parts if part is not None]
    first = present[0]
    for part in present:
        if (part.in_features, part.out_features) != (first.in_features, first.out_features):
            raise ShapeError(
                f"module {path}",
                got=f"{part.in_features} inputs and {part.out_features} outputs in one adapter",
                expected=f"{first.in_features} and {first.out_features}, as in another",
                fix="compose adapters of one base model",
            )
    scaling = max((part.scaling for part in present), key=abs)
    dtype = _common_dtype(present, scaling)
    if router is None:
        return _sum(path, present, scaling, dtype, limits)
    return _mixture(path, parts, scaling, dtype, router)


def _common_dtype(parts: list[HydraWeights], scaling: float) -> torch.dtype:
    dtype = parts[0].a.dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.a.dtype)
        if part.scaling != scaling:
            dtype = torch.promote_types(dtype, torch.float32)
    return dtype


def _scaled_b(part: HydraWeights, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """B [out, r] of a part, for a module whose scaling is `scaling`."""
    b = part.b[0].to(dtype)
    return b if part.scaling == scaling else b * (part.scaling / scaling)


def _sum(
    path: str, parts: list[HydraWeights], scaling: float, dtype: torch.dtype, limits: AdapterLimits
) -> HydraWeights:
    ranks = [part.layout.rank for part in parts]
    if sum(ranks) > limits.rank:
        raise LimitError(
            f"rank of {path}",
            got=f"{sum(ranks)} = {' + '.join(map(str, ranks))}",
            expected=f"at most {limits.rank}",
            fix="compose fewer adapters, or ones of smaller rank",
        )
    return HydraWeights(
        a=torch.cat([part.a.to(dtype) for part in parts]),
        b=torch.cat([_scaled_b(part, scaling, dtype) for part in parts], dim=1)[None],
        layout=Layout(sum(ranks)),
        scaling=scaling,
    )


def _mixture(
    path: str, parts: list[HydraWeights | None], scaling: float, dtype: torch.dtype, file: RouterFile
) -> HydraWeights:
    present = [part for part in parts if part is not None]
    heads, rank = len(parts), max(part.layout.rank for part in present)
    in_features, out_features = present[0].in_features, present[0].out_features
    router, bias = file.routers[path]
    for name, tensor, shape in (("weight", router, (heads, in_features)), ("bias", bias, (heads,))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(
                f"{path}.router.{name}",
                got=f"shape {list(tensor.shape)}",
                expected=f"{list(shape)}: a row for each of the {heads} adapters, a column for each input",
                fix="give the router that was trained with these adapters, in this order",
            )
    dtype = torch.promote_types(dtype, router.dtype)
    a, b = torch.zeros(heads, rank, in_features, dtype=dtype), torch.zeros(heads, out_features, rank, dtype=dtype)
    for i, part in enumerate(parts):
        if part is not None:
            a[i, : part.layout.rank] = part.a
            b[i, :, : part.layout.rank] = _scaled_b(part, scaling, dtype)
    top_k = 0 if file.top_k >= heads else file.top_k
    layout = Layout(
        rank,
        heads,
        shared_a=heads == 1,
        top_k=top_k,
        renormalize=file.renormalize or not top_k,
        has_router=True,
        has_bias=bias is not None,
    )
    return HydraWeights(
        a=a.view(-1, in_features), b=b, layout=layout, router=router.to(dtype), bias=bias, scaling=scaling
    )


def _check_routers(file: RouterFile, paths: Sequence[str]) -> None:
    """Raises unless there is a router for each of these modules, and for no other."""
    if absent := [path for path in paths if path not in file.routers]:
        raise MissingTensorError(
            f"{absent[0]}.router.weight",
            got="no such tensor",
            expected="a router for every module that one of the adapters adapts",
            fix="give the router that was trained with these adapters",
        )
    if unused := sorted(set(file.routers) - set(paths)):
        raise UnexpectedTensorError(
            f"{unused[0]}.router.weight",
            got="a router for a module that no adapter adapts",
            expected="none",
            fix="give the router that was trained with these adapters",
        )
