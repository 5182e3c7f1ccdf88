"""HydraLoRA as the authors' training leaves it on disk: one A, one router, E heads for each module.

Source: Clin0212/HydraLoRA (arXiv:2404.19245). For each adapted linear layer

    {module}.lora_route.weight [E, in]    {module}.lora_A.weight [r, in]    {module}.lora_B{i}.weight [out, r]

and in adapter_config.json peft_type "LORA", r, lora_nums (E) and lora_alpha; s = lora_alpha / r.

Layers of different r and E. The authors' code makes all layers alike, its file format does not: each layer's tensors
state their own sizes. A layer is read as its tensors say, if its router has as many rows as it has heads, and
s = lora_alpha / r with the layer's own r. What ties the configuration to the tensors is then:

- without `rank_pattern` and `lora_nums_pattern`: `r` and `lora_nums` must be those of at least one layer;
- with them (PEFT's rule of matching; `save_hydralora` writes both for such adapters): every layer must be as they
  say, layers that no pattern names as `r` and `lora_nums` say. `alpha_pattern` likewise gives a layer's lora_alpha.

`use_rslora`, which the authors' code does not have, means what it means in PEFT. Neither has it a bias of the router;
where a fork saved one ({module}.lora_route.bias [E]), it is added to the logits. mtLoRA without its fine-grained
routing and block adapters is this method, too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from hydra_kernels import Layout

from hydraserve.adapters.config import AdapterConfig, PatternMatcher, PerModule
from hydraserve.adapters.formats.features import refuse_features
from hydraserve.adapters.formats.plan import PREFIX, ModulePlan, group, matrix, widest
from hydraserve.adapters.formats.relatives import refuse_relatives
from hydraserve.adapters.tensors import TensorInfo
from hydraserve.errors import AdapterConfigError, MissingTensorError, ShapeError, UnexpectedTensorError

NAME = "hydralora"
_TENSOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>route\.bias$|(?:route|A|B(?:0|[1-9]\d{0,8}))(?=\.weight$))(?:\.weight)?"
)
_ROUTE = re.compile(r".+\.lora_route\.weight")
_HEAD = re.compile(r".+\.lora_B\d+\.weight")
_OWN_A = re.compile(r".+\.lora_A\d+\.weight")
_EXPORT_AGAIN = "export or copy the adapter again"


def recognise(config: AdapterConfig, names: Collection[str]) -> str | None:
    """Why this is HydraLoRA in the authors' layout, or None. A fork (mtLoRA) also writes peft_type "HYDRALORA"."""
    if config.fields.get("peft_type") not in ("LORA", "HYDRALORA") or _any(_OWN_A, names):
        return None
    if config.peft_type == "HYDRALORA" and not (_any(_ROUTE, names) and _any(_HEAD, names)):
        return None
    reasons = ["lora_nums in the config"] if config.fields.get("lora_nums") is not None else []
    if _any(_ROUTE, names) or _any(_HEAD, names):
        reasons.append("tensors lora_route and lora_B0, lora_B1, ...")
    return " and ".join(reasons) or None


def _any(pattern: re.Pattern[str], names: Collection[str]) -> bool:
    return any(pattern.fullmatch(name) for name in names)


def plan(config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> dict[str, ModulePlan]:
    """Module path -> plan, in the order of the file.

    Raises AdapterError's subclasses for whatever does not fit together.
    """
    refuse_relatives(config, infos)
    refuse_features(config.fields)
    matcher = PatternMatcher(config.limits)
    rank = config.counts("r", "rank_pattern", config.limits.rank, matcher)
    heads = config.counts("lora_nums", "lora_nums_pattern", config.limits.heads, matcher)
    alpha = config.alphas(matcher)
    modules = group(infos, _TENSOR)
    config.check_targets(modules, whole_components=False)
    plans = {}
    for path, parts in modules.items():
        layout, in_features, out_features = _module(config, infos, path, parts, heads.of(path))
        plans[path] = ModulePlan(
            layout=layout,
            scaling=config.scaling(layout.rank, alpha.of(path)),
            in_features=in_features,
            out_features=out_features,
            dtype=widest(infos, parts.values()),
            a=(parts["A"],),
            heads=tuple(parts[f"B{i}"] for i in range(layout.heads)),
            router=parts["route"],
            bias=parts.get("route.bias"),
        )
    declared = bool(rank.pattern or heads.pattern)
    _check_declared(rank, {path: plan.layout.rank for path, plan in plans.items()}, declared)
    _check_declared(heads, {path: plan.layout.heads for path, plan in plans.items()}, declared)
    return plans


def _module(
    config: AdapterConfig, infos: Mapping[str, TensorInfo], path: str, parts: Mapping[str, str], lora_nums: int
) -> tuple[Layout, int, int]:
    """Layout, in and out of one module, from the shapes of its tensors, which must agree with one another."""
    for part in ("A", "route"):
        if part not in parts:
            raise _missing(path, part, next(iter(parts.values())))
    heads = _heads(config, infos, path, parts, lora_nums)
    rank, in_features = matrix(infos, parts["A"])
    config.limits.check(f"rank of {path}", rank, config.limits.rank)
    routed = matrix(infos, parts["route"])[1]
    if routed != in_features:
        raise ShapeError(
            f"{parts['A']} and {parts['route']}",
            got=f"{in_features} and {routed} columns",
            expected="as many columns as the layer has inputs, in both",
            fix=_EXPORT_AGAIN,
        )
    out_features, _ = matrix(infos, parts["B0"])
    for i in range(heads):
        if matrix(infos, parts[f"B{i}"]) != (out_features, rank):
            raise ShapeError(
                parts[f"B{i}"],
                got=f"shape {list(infos[parts[f'B{i}']].shape)}",
                expected=f"[{out_features}, {rank}], [out, r] by {parts['A']} and head 0",
                fix=_EXPORT_AGAIN,
            )
    if "route.bias" in parts and infos[parts["route.bias"]].shape != (heads,):
        raise ShapeError(
            parts["route.bias"],
            got=f"shape {list(infos[parts['route.bias']].shape)}",
            expected=f"[{heads}], a number for each head",
            fix=_EXPORT_AGAIN,
        )
    return Layout(rank, heads, has_router=True, has_bias="route.bias" in parts), in_features, out_features


def _heads(
    config: AdapterConfig, infos: Mapping[str, TensorInfo], path: str, parts: Mapping[str, str], lora_nums: int
) -> int:
    """E of a module: the number of its heads and of its router's rows, which must agree.

    Where they do not, `lora_nums` tells whether a head or the router is at fault.
    """
    count = sum(part.startswith("B") for part in parts)
    rows, _ = matrix(infos, parts["route"])
    config.limits.check(f"heads of {path}", max(count, rows), config.limits.heads)
    first_absent = next(i for i in range(count + 1) if f"B{i}" not in parts)
    if first_absent < count or (first_absent < rows == lora_nums):
        raise _missing(path, f"B{first_absent}", parts["route"], f" (head {first_absent} of {rows})")
    if count == rows:
        return count
    if rows == lora_nums:
        raise UnexpectedTensorError(
            parts[f"B{rows}"],
            got=f"head {rows}",
            expected=f"{rows} heads, as {parts['route']} has rows",
            fix=_EXPORT_AGAIN,
        )
    raise ShapeError(
        parts["route"],
        got=f"{rows} rows",
        expected=f"{count}, one for each head lora_B0 to lora_B{count - 1}",
        fix=f"{_EXPORT_AGAIN}; routers with a row for each group of outputs (mtLoRA's fine-grained routing) or with "
        "2E-1 rows (HydraFed-LEASE's adaptive routing) are other methods, which are not supported",
    )


def _check_declared(setting: PerModule[int], found: Mapping[str, int], every_module: bool) -> None:
    """`r` or `lora_nums` against the tensors: of every module, or of at least one (see the top of the file)."""
    if not every_module and setting.default not in found.values():
        path, value = next(iter(found.items()))
        raise _disagrees(setting.name, setting.default, value, path)
    for path, value in found.items():
        if every_module and setting.of(path) != value:
            raise _disagrees(setting.name, setting.of(path), value, path)


def _disagrees(name: str, declared: int, found: int, path: str) -> AdapterConfigError:
    return AdapterConfigError(
        name, got=declared, expected=f"{found}, by the tensors of {path}", fix=f"set {name} to what the tensors hold"
    )


def _missing(path: str, part: str, have: str, note: str = "") -> MissingTensorError:
    name = f"{path}.lora_{part}.weight"
    prefix = PREFIX if have.startswith(PREFIX) else ""
    return MissingTensorError(
        f"{prefix}{name}{note}", got="no such tensor", expected="all of the module's tensors", fix=_EXPORT_AGAIN
    )
