"""What the formats of mixtures share: the tensors of one module, checked against one another, become its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hydra_kernels import Carry, Layout

from hydraserve.adapters.formats.plan import PREFIX, ModulePlan, matrix, widest
from hydraserve.adapters.tensors import TensorInfo
from hydraserve.errors import MissingTensorError, ShapeError

EXPORT_AGAIN = "export or copy the adapter again"
BY_CONFIG = "use the adapter_config.json saved with these tensors"


@dataclass(frozen=True, slots=True)
class MixtureParts:
    """Names of one module's tensors.

    a:      [r, in], one for all heads, or one for each.
    heads:  [out, r] each, one or more.
    router: [E, in]; `heads` may name fewer tensors than it has rows only where it names some of them twice.
    bias:   [E], added to the router's logits, or None.
    """

    a: tuple[str, ...]
    heads: tuple[str, ...]
    router: str
    bias: str | None = None


def mixture_plan(
    infos: Mapping[str, TensorInfo],
    parts: MixtureParts,
    *,
    rank: int,
    scaling: float,
    top_k: int = 0,
    carry: Carry = Carry.NONE,
) -> ModulePlan:
    """The plan of a module whose heads a router mixes.

    rank:  r by the configuration.
    top_k: the k largest weights count, scaled to sum to one; 0, or at least the number of heads: all of them.

    Raises ShapeError when a tensor's shape is not what the configuration and the other tensors say.
    """
    heads = len(parts.heads)
    _, in_features = matrix(infos, parts.router)
    out_features, _ = matrix(infos, parts.heads[0])
    expect(infos, parts.router, (heads, in_features), "a row for each head")
    for name in parts.a:
        expect(infos, name, (rank, in_features), "[r, in] by the configuration and the router")
    for name in parts.heads:
        expect(infos, name, (out_features, rank), "[out, r] by the first head and the configuration")
    if parts.bias is not None:
        expect(infos, parts.bias, (heads,), "a number for each head")
    top_k = 0 if top_k >= heads else top_k
    return ModulePlan(
        layout=Layout(
            rank,
            heads,
            shared_a=len(parts.a) == 1,
            top_k=top_k,
            has_router=True,
            has_bias=parts.bias is not None,
            carry=carry,
        ),
        scaling=scaling,
        in_features=in_features,
        out_features=out_features,
        dtype=widest(infos, (*parts.a, *parts.heads, parts.router, *([parts.bias] if parts.bias else []))),
        a=parts.a,
        heads=parts.heads,
        router=parts.router,
        bias=parts.bias,
    )


def expect(infos: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...], why: str) -> None:
    """Raises ShapeError unless the tensor has this shape."""
    if infos[name].shape != shape or 0 in shape:
        raise ShapeError(name, got=f"shape {list(infos[name].shape)}", expected=f"{list(shape)}, {why}", fix=BY_CONFIG)


def numbered(path: str, parts: Mapping[str, str], prefix: str, count: int, name: str) -> tuple[str, ...]:
    """The tensors of the parts prefix0, prefix1 ... prefix{count - 1} of a module.

    name: what such a tensor is called after the module's path, with {} for its number.

    Raises MissingTensorError or ShapeError when there are fewer or more.
    """
    for i in range(count):
        if f"{prefix}{i}" not in parts:
            raise missing(path, name.format(i), next(iter(parts.values())))
    found = sum(part.removeprefix(prefix).isdecimal() for part in parts if part.startswith(prefix))
    if found > count:
        raise ShapeError(
            f"{path}.{name.format('*')}",
            got=f"{found} such tensors",
            expected=f"{count} by the configuration",
            fix=BY_CONFIG,
        )
    return tuple(parts[f"{prefix}{i}"] for i in range(count))


def required(path: str, parts: Mapping[str, str], part: str, name: str) -> str:
    """The tensor of one part of a module, called `name` after the module's path. Raises MissingTensorError."""
    if part not in parts:
        raise missing(path, name, next(iter(parts.values())))
    return parts[part]


def missing(path: str, name: str, have: str) -> MissingTensorError:
    """The error for a tensor that the module's other tensors (`have` is one of them) call for."""
    prefix = PREFIX if have.startswith(PREFIX) else ""
    return MissingTensorError(
        f"{prefix}{path}.{name}", got="no such tensor", expected="all of the module's tensors", fix=EXPORT_AGAIN
    )
