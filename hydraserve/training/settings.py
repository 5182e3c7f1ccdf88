"""What a training run is told: one frozen record, validated once. The command line takes its defaults from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hydraserve.errors import ConfigError

METHODS = ("hydralora", "lora")
DTYPES = ("float32", "bfloat16")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
HEADS_METHODS = ("kmeans", "dbscan")
# What decides the course of a run, so a resumed one must have the same. Not its length: a run may be made longer.
RESUMED = (
    "model", "method", "heads", "rank", "alpha", "dropout", "rslora", "target_modules", "load_balance", "router_z",
    "template", "max_length", "packing", "batch_size", "accumulate", "lr", "scheduler", "warmup", "weight_decay",
    "eval_share", "dtype", "seed",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Settings of one run. Raises ConfigError for values that cannot be.

    model, data, output: base model (name or folder), files of examples, folder for the adapter.
    method:         "hydralora", or "lora" for comparison.
    heads:          E, or "auto" to choose it from the data. Not used by plain LoRA.
    heads_method, max_heads: how "auto" chooses, and the largest number that k-means tries.
    rank, alpha, dropout, rslora, target_modules: of the adapter. target_modules empty, or
                    "all-linear" alone: every linear layer.
    template:       "chat", "alpaca", "plain", or "auto": chat where the tokenizer has a template, else alpaca.
    max_length:     tokens of an example, beyond which it is cut; with packing also the length of a row.
    packing:        several examples to a row of `max_length` tokens.
    epochs, max_steps: how long; max_steps > 0 wins.
    batch_size:     rows in one forward pass; times `accumulate` rows in one step of the optimiser.
    warmup:         share of the steps over which the learning rate rises.
    eval_share:     share of the examples set aside for evaluation, 0 for none.
    eval_every, save_every, log_every: steps. eval_every 0: at each epoch's end. save_every 0: only at the end.
    dtype:          of the base model. The adapter trains in float32.
    save_dtype:     of the saved adapter.
    base_name:      name of the base model that is written into the adapter; default: `model`, a short name in full.
    resume:         go on from the newest checkpoint in `output`.
    overwrite:      replace an adapter, and remove checkpoints, that are in `output`.
    """

    model: str
    data: tuple[Path, ...]
    output: Path
    method: str = "hydralora"
    heads: int | Literal["auto"] = 4
    heads_method: str = "kmeans"
    max_heads: int = 10
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    target_modules: tuple[str, ...] = ()
    load_balance: float = 0.0
    router_z: float = 0.0
    template: str = "auto"
    max_length: int = 512
    packing: bool = False
    epochs: float = 3.0
    max_steps: int = 0
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 2e-4
    scheduler: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    eval_share: float = 0.0
    eval_every: int = 0
    save_every: int = 0
    log_every: int = 10
    dtype: str = "bfloat16"
    save_dtype: str = "float32"
    gradient_checkpointing: bool = False
    base_name: str | None = None
    seed: int = 0
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        choices = {"method": METHODS, "dtype": DTYPES, "save_dtype": DTYPES, "scheduler": SCHEDULERS}
        choices["heads_method"] = HEADS_METHODS
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(name, got=getattr(self, name), expected="one of " + ", ".join(allowed))
        for name in ("rank", "batch_size", "accumulate", "log_every"):
            _check(name, getattr(self, name), "at least 1", getattr(self, name) >= 1)
        for name in ("alpha", "lr", "epochs"):
            _check(name, getattr(self, name), "more than 0", getattr(self, name) > 0)
        for name in ("load_balance", "router_z", "weight_decay", "eval_every", "save_every", "max_steps"):
            _check(name, getattr(self, name), "0 or more", getattr(self, name) >= 0)
        for name in ("dropout", "eval_share", "warmup"):
            _check(name, getattr(self, name), "0 or more and less than 1", 0 <= getattr(self, name) < 1)
        _check("max_length", self.max_length, "at least 8 tokens", self.max_length >= 8)
        _check("max_heads", self.max_heads, "at least 3: an elbow needs a curve", self.max_heads >= 3)
        _check("overwrite", "resume as well", "one of the two", not (self.overwrite and self.resume))
        _check("heads", self.heads, 'at least 1, or "auto"', self.heads == "auto" or self.heads >= 1)

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer is adapted."""
        return self.target_modules in ((), ("all-linear",))

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.output / "checkpoints"


def _check(name: str, value: object, expected: str, good: bool) -> None:
    if not good:
        raise ConfigError(name, got=value, expected=expected)
