"""The configuration of a HydraLoRA adapter, saved as adapter_config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from hydraserve.adapters.config import PatternMatcher
from hydraserve.adapters.limits import DEFAULT_LIMITS
from hydraserve.errors import AdapterConfigError
from hydraserve.tuner.register import peft_type


@dataclass
class HydraLoraConfig(PeftConfig):
    """One A, `num_heads` matrices B and a router in every adapted linear layer (arXiv:2404.19245, section 3).

    r:                   rank of A and of each B.
    num_heads:           E, number of matrices B. `hydraserve heads` suggests one for a data set.
    lora_alpha:          the delta is scaled by lora_alpha / r, the same for every head.
    use_rslora:          scale by lora_alpha / sqrt(r) instead (arXiv:2312.03732).
    lora_dropout:        dropout on the input of A, in training. The router sees the input without dropout.
    target_modules:      names (suffixes) or one regular expression; "all-linear" for every linear layer but the
                         output. None: what PEFT chooses for LoRA on this architecture.
    exclude_modules:     names or a regular expression that are left out again.
    rank_pattern, alpha_pattern, num_heads_pattern:
                         name or regular expression of modules -> their own r, lora_alpha, num_heads. What the
                         server would refuse in an expression, counted repeats and "(?", is refused here as well.
    load_balance_coef:   weight of E * sum_i mean(w_i)^2, least (1) when the heads get equal shares of the tokens;
                         0 as in the paper.
    router_z_coef:       weight of mean(logsumexp(logits)^2) (arXiv:2202.08906, eq. 5); 0 as in the paper.
                         Both are averaged over the adapted layers. See `hydraserve.tuner.losses`.
    modules_to_save:     further modules to train and save whole. The server does not load such adapters.
    init_weights:        True: the delta starts at zero. False: B random as well, for tests.
    layers_to_transform, layers_pattern: only these layer indices, as in PEFT's LoraConfig; with a list of names only.

    Raises ValueError for values outside their range.
    """

    r: int = 8
    num_heads: int = 4
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    num_heads_pattern: dict[str, int] = field(default_factory=dict)
    load_balance_coef: float = 0.0
    router_z_coef: float = 0.0
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = peft_type()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's own configs do
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        for name in ("r", "num_heads"):
            _check_count(name, getattr(self, name))
        _check_alpha("lora_alpha", self.lora_alpha)
        self._check_patterns()
        for name in ("load_balance_coef", "router_z_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 0")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform: got {self.layers_to_transform} with target_modules={self.target_modules!r}, "
                f"beside which PEFT passes it over; expected a list of names as target_modules"
            )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: got {self.lora_dropout}, expected 0 <= lora_dropout < 1")

    def _check_patterns(self) -> None:
        checks = {"rank_pattern": _check_count, "num_heads_pattern": _check_count, "alpha_pattern": _check_alpha}
        matcher = PatternMatcher(DEFAULT_LIMITS)
        for name, check in checks.items():
            for key, value in getattr(self, name).items():
                check(f"{name}[{key!r}]", value)
                try:
                    matcher.add(name, key)
                except AdapterConfigError as e:
                    raise ValueError(str(e)) from e

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets in order, so that the same adapter is always the same file."""
        values: dict[str, Any] = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    def rank_of(self, module: str) -> int:
        """r of the module with this dotted name."""
        return int(_lookup(self.rank_pattern, module, self.r))

    def heads_of(self, module: str) -> int:
        """E of the module with this dotted name."""
        return int(_lookup(self.num_heads_pattern, module, self.num_heads))

    def scaling_of(self, module: str) -> float:
        """s of the module with this dotted name."""
        alpha, rank = _lookup(self.alpha_pattern, module, self.lora_alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _lookup(pattern: Mapping[str, float], module: str, default: float) -> float:
    return pattern.get(get_pattern_key(list(pattern), module), default)


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:  # not isinstance: True is no rank
        raise ValueError(f"{name}: got {value}, expected a whole number of at least 1")


def _check_alpha(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, expected more than 0")
