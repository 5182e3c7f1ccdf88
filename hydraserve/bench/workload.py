"""What is asked of a server: how many requests, when, for which adapter, how long."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hydraserve.errors import ConfigError

# Of hydra_kernels.testing.MIXES, those that spread requests over adapters.
POPULARITIES = ("identical", "distinct", "uniform", "zipf")

# Conversations outside these sizes, in tokens, are left out, as the field's other benchmarks do with this file.
SHAREGPT_SHORTEST, SHAREGPT_LONGEST_PROMPT, SHAREGPT_LONGEST = 4, 1024, 2048


@dataclass(frozen=True)
class Request:
    """One request: the model it names, its prompt as token ids, how many tokens to generate, when to send it.

    at: seconds after the start of the run; 0 under a closed loop, where the client decides.
    """

    model: str
    prompt: tuple[int, ...]
    output_tokens: int
    at: float = 0.0


@dataclass(frozen=True)
class Load:
    """How hard the server is driven: `concurrency` requests at any time (closed loop), or requests that arrive at
    `rate` per second whether or not the server keeps up (open loop).

    burstiness: of the open loop: intervals are gamma distributed with this shape. 1 is a Poisson process, less is
                burstier, more is more regular.
    """

    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None) or not (
            0 < self.value < math.inf and 0 < self.burstiness < math.inf  # neither for a NaN
        ):
            raise ConfigError(
                what="load",
                got=f"concurrency {self.concurrency}, rate {self.rate}, burstiness {self.burstiness}",
                expected="a positive concurrency or a positive rate, and a positive burstiness",
                fix="--batch 1,8,32 for a closed loop, or --rate 2,4 for an open one",
            )

    @property
    def value(self) -> float:
        """The number on the plot's axis."""
        return float(self.concurrency if self.concurrency is not None else self.rate or 0.0)

    @property
    def label(self) -> str:
        return f"batch {self.concurrency}" if self.concurrency is not None else f"{self.rate:g} requests/s"


@dataclass(frozen=True)
class Lengths:
    """A fixed length, or a range that lengths are drawn from (both ends included)."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, flag: str) -> Lengths:
        """ "64" or "32-128". Raises ConfigError."""
        low, _, high = text.partition("-")
        try:
            result = cls(int(low), int(high or low))
            if not 1 <= result.low <= result.high:
                raise ValueError(text)
        except ValueError as e:
            raise ConfigError(flag, repr(text), "a length in tokens, or a range", f"for example {flag} 32-128") from e
        return result

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        return [int(n) for n in rng.integers(self.low, self.high + 1, count)]

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Workload:
    """Everything about the requests but how fast they come and which adapters there are.

    vocabulary:    prompts are random token ids below this, so their length is exact and no two share a prefix.
    popularity:    how requests are spread over the adapters, one of POPULARITIES.
    conversations: (prompt, output length) pairs to draw from instead, see `read_sharegpt`.
    """

    vocabulary: int
    input_len: Lengths = Lengths(32, 32)
    output_len: Lengths = Lengths(64, 64)
    popularity: str = "distinct"
    conversations: tuple[tuple[tuple[int, ...], int], ...] = ()

    def requests(self, count: int, models: Sequence[str], load: Load, seed: int) -> list[Request]:
        """`count` requests over `models`. The same seed gives the same lengths, prompts and times for any models."""
        rng = np.random.default_rng(seed)
        texts = self._texts(count, rng)
        times = arrivals(load.rate, load.burstiness, count, rng) if load.rate else [0.0] * count
        names = assign_models(self.popularity, count, models, seed)
        return [
            Request(name, prompt, output, at) for name, (prompt, output), at in zip(names, texts, times, strict=True)
        ]

    def _texts(self, count: int, rng: np.random.Generator) -> list[tuple[tuple[int, ...], int]]:
        if self.conversations:
            return [self.conversations[i] for i in rng.integers(0, len(self.conversations), count)]
        lengths = zip(self.input_len.draw(count, rng), self.output_len.draw(count, rng), strict=True)
        return [(tuple(rng.integers(0, self.vocabulary, n).tolist()), output) for n, output in lengths]

    @property
    def longest(self) -> int:
        """The most tokens that one request can come to."""
        if self.conversations:
            return max(len(prompt) + output for prompt, output in self.conversations)
        return self.input_len.high + self.output_len.high

    def describe(self) -> dict[str, Any]:
        """For the result file."""
        lengths = (
            {"conversations": len(self.conversations)}
            if self.conversations
            else {
                "input_len": str(self.input_len),
                "output_len": str(self.output_len),
            }
        )
        return {**lengths, "popularity": self.popularity, "ignore_eos": True, "temperature": 0}


def assign_models(popularity: str, count: int, models: Sequence[str], seed: int) -> list[str]:
    """The model of each request. "distinct" deals them out in turn; "zipf" has exponent 1.5."""
    if len(models) == 1:
        return [models[0]] * count
    from hydra_kernels.testing import token_slots

    return [models[i] for i in token_slots(popularity, count, len(models), seed)]


def arrivals(rate: float, burstiness: float, count: int, rng: np.random.Generator) -> list[float]:
    """`count` times in seconds, from 0, with gamma distributed intervals, scaled so that their mean is 1 / rate.

    Unscaled, 40 requests come at anything from 0.7 to 1.4 times the rate, by chance, and say so of the server.
    """
    intervals = rng.gamma(shape=burstiness, size=count)
    times = np.cumsum(intervals) - intervals[0]
    span = times[-1] or 1.0  # 0: a single request
    return [float(t) for t in times / span * (count - 1) / rate]


def read_sharegpt(path: Path, tokenizer: Any) -> tuple[tuple[tuple[int, ...], int], ...]:
    """The first exchange of each conversation of a ShareGPT-form file: (prompt as token ids, length of the answer).

    The file is a JSON list of {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}, ...]}.

    Raises ConfigError when nothing in it can be used.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        turns = [entry["conversations"][:2] for entry in entries if len(entry.get("conversations", ())) >= 2]
        texts = [(prompt["value"], answer["value"]) for prompt, answer in turns]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise _unusable(path, f"{type(e).__name__}: {e}") from e
    result = []
    for prompt, answer in texts:
        ids, length = tuple(tokenizer.encode(prompt)), len(tokenizer.encode(answer))
        fits = len(ids) <= SHAREGPT_LONGEST_PROMPT and len(ids) + length <= SHAREGPT_LONGEST
        if fits and min(len(ids), length) >= SHAREGPT_SHORTEST:
            result.append((ids, length))
    if not result:
        raise _unusable(path, f"{len(texts)} conversations, none of a usable size")
    return tuple(result)


def _unusable(path: Path, got: str) -> ConfigError:
    return ConfigError(
        what=f"--dataset {path}",
        got=got,
        expected='a JSON list of {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}',
        fix="give a file of that form, or leave --dataset out for random prompts",
    )
