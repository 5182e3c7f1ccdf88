"""HydraFed-LEASE: LoRAMoE's tensors with top-k routing, and an A that all heads may be tied to.

For each adapted linear layer the tensors of LoRAMoE (see `loramoe`), and beside its fields in adapter_config.json

    k              the k largest of the softmax count, scaled to sum to one; 0: all of them
    shared_lora_a  all lora_A{i} are one tensor, saved E times
    adaptive       the router has 2E - 1 rows: those beyond E stand for head `idx` once more each. The E largest
                   weights of all the rows count, scaled to sum to one; `k` is not read
    universal_idx  another way to compute the weights (a residual of one universal head): refused

An adaptive router is served as a mixture of 2E - 1 heads, of which the surplus ones are copies of head `idx`: the
same sum. Tied copies of A that really are equal are kept as one A, see `TiedPlan`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace

import torch
from hydra_kernels import HydraWeights

from hydraserve.adapters.config import AdapterConfig, PatternMatcher
from hydraserve.adapters.formats.features import refuse_features
from hydraserve.adapters.formats.mixture import MixtureParts, mixture_plan, numbered, required
from hydraserve.adapters.formats.plan import ModulePlan, group
from hydraserve.adapters.formats.relatives import refuse_relatives
from hydraserve.adapters.tensors import TensorInfo
from hydraserve.errors import AdapterConfigError, ShapeError, UnsupportedFeatureError

NAME = "hydrafed-lease"
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>route|[AB](?:0|[1-9]\d{0,8}))\.weight")
_OWN_A = re.compile(r".+\.lora_A\d+\.weight")
_FIELDS = ("k", "adaptive", "idx", "universal_idx", "shared_lora_a")


def is_lease(config: AdapterConfig) -> bool:
    """Whether the configuration has fields of this method's alone."""
    return any(field in config.fields for field in _FIELDS)


def recognise(config: AdapterConfig, names: Collection[str]) -> str | None:
    """Why this is HydraFed-LEASE, or None."""
    if config.fields.get("peft_type") != "LORA" or not is_lease(config):
        return None
    if not any(_OWN_A.fullmatch(name) for name in names):
        return None
    present = ", ".join(field for field in _FIELDS if field in config.fields)
    return f"{present} in the config, tensors lora_route and lora_A0, lora_A1, ..."


def plan(config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> dict[str, ModulePlan]:
    """Module path -> plan, in the order of the file.

    Raises AdapterError's subclasses for whatever does not fit together.
    """
    refuse_relatives(config, infos, reads=_FIELDS)
    refuse_features(config.fields)
    if config.fields.get("universal_idx") is not None:
        raise UnsupportedFeatureError(
            "universal_idx",
            got=f"{config.fields['universal_idx']!r}: a residual of one universal head",
            expected="null",
            fix="none: the routing weights are computed in another way",
        )
    matcher = PatternMatcher(config.limits)
    ranks = config.counts("r", "rank_pattern", config.limits.rank, matcher)
    heads = config.counts("lora_nums", "lora_nums_pattern", config.limits.heads, matcher)
    alphas = config.alphas(matcher)
    modules = group(infos, _TENSOR)
    config.check_targets(modules, whole_components=False)
    tied = config.flag("shared_lora_a")
    plans = {}
    for path, parts in modules.items():
        rank, count = ranks.of(path), heads.of(path)
        found = _parts(config, infos, path, parts, count)
        top_k = count if config.flag("adaptive") else config.whole("k")
        scaling = config.scaling(rank, alphas.of(path))
        result = mixture_plan(infos, found, rank=rank, scaling=scaling, top_k=top_k)
        plans[path] = TiedPlan.of(result) if tied else result
    return plans


def _parts(
    config: AdapterConfig, infos: Mapping[str, TensorInfo], path: str, parts: Mapping[str, str], heads: int
) -> MixtureParts:
    a = numbered(path, parts, "A", heads, "lora_A{}.weight")
    b = numbered(path, parts, "B", heads, "lora_B{}.weight")
    router = required(path, parts, "route", "lora_route.weight")
    adaptive = config.flag("adaptive")
    rows, expected = infos[router].shape[0], 2 * heads - 1 if adaptive else heads
    if rows != expected:
        raise ShapeError(
            router,
            got=f"{rows} rows",
            expected=f"{expected}, by lora_nums {heads} and adaptive {str(adaptive).lower()}",
            fix="use the adapter_config.json saved with these tensors",
        )
    if adaptive:
        idx = config.whole("idx")
        if idx >= heads:
            raise AdapterConfigError("idx", got=idx, expected=f"a head, 0 to {heads - 1}", fix="correct the field")
        a, b = a + (a[idx],) * (heads - 1), b + (b[idx],) * (heads - 1)
    return MixtureParts(a, b, router)


@dataclass(frozen=True, slots=True)
class TiedPlan(ModulePlan):
    """A plan whose A tensors are said to be equal: one of them serves all heads.

    `build` raises AdapterConfigError when they are not.
    """

    @classmethod
    def of(cls, plan: ModulePlan) -> TiedPlan:
        values = {field.name: getattr(plan, field.name) for field in fields(ModulePlan)}
        return cls(**{**values, "layout": replace(plan.layout, shared_a=True)})

    def build(self, tensors: Mapping[str, torch.Tensor]) -> HydraWeights:
        first = tensors[self.a[0]]
        for name in self.a[1:]:
            if not torch.equal(tensors[name], first):
                raise AdapterConfigError(
                    "shared_lora_a",
                    got=f"true, and {name} differs from {self.a[0]}",
                    expected="equal A for all heads",
                    fix="set shared_lora_a to false if the heads were trained apart",
                )
        return ModulePlan.build(self, tensors)

    def _a(self, taken: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return taken[self.a[0]]
