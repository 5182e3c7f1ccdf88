"""From what a client saw of each request to the numbers that are printed, and their medians over repeats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from hydraserve.errors import ConfigError

PERCENTILES = (50, 90, 99)

# Flat, so that it is read, averaged and plotted alike: "tpot_ms.p50" -> 41.2. None: nothing to measure it from.
Metrics = dict[str, float | None]


@dataclass(frozen=True)
class RequestRecord:
    """One request as its client saw it; times in seconds on one monotonic clock.

    model:         the name it asked for.
    start:         when it was sent; under an open loop, when it was due.
    tokens:        (time, output tokens so far) for each arrival that brought new ones.
    prompt_tokens: as the server counted them.
    error:         why it failed, or None. What a failed request had received so far counts nowhere.
    lag:           open loop: how many seconds after `start` it was really sent.
    """

    model: str
    start: float
    tokens: tuple[tuple[float, int], ...] = ()
    prompt_tokens: int = 0
    error: str | None = None
    lag: float | None = None

    @property
    def output_tokens(self) -> int:
        return self.tokens[-1][1] if self.tokens else 0

    @property
    def end(self) -> float:
        """When the last token came."""
        return self.tokens[-1][0] if self.tokens else self.start

    @property
    def ttft(self) -> float:
        """Seconds from `start` to the first token."""
        return self.tokens[0][0] - self.start

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first arrival, None when there was only one arrival."""
        later = self.output_tokens - self.tokens[0][1]
        return (self.end - self.tokens[0][0]) / later if later else None

    @property
    def latency(self) -> float:
        """Seconds from `start` to the last token."""
        return self.end - self.start

    def gaps(self) -> list[float]:
        """Seconds between one token and the next. Of tokens that arrive together, all but the first waited 0."""
        result: list[float] = []
        for (before, had), (now, has) in zip(self.tokens, self.tokens[1:], strict=False):
            result += [now - before] + [0.0] * (has - had - 1)
        return result


@dataclass(frozen=True)
class Slo:
    """What a user must get for a request to count as good, in milliseconds; None: no demand."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """ "ttft=500,tpot=50". Raises ConfigError."""
        try:
            parts = [part.split("=") for part in text.split(",") if part]
            limits = {name.strip(): float(value) for name, value in parts}
            if not limits or not all(limit > 0 for limit in limits.values()):
                raise ValueError(text)
            return cls(**limits)
        except (ValueError, TypeError) as e:
            raise ConfigError(
                what="--slo",
                got=repr(text),
                expected="limits in milliseconds out of ttft, tpot and e2e",
                fix="for example --slo ttft=500,tpot=50",
            ) from e

    def met_by(self, record: RequestRecord) -> bool:
        """Whether the request was answered within every limit; a single token has no TPOT to miss."""
        if record.error is not None or not record.tokens:
            return False
        times = ((self.ttft, record.ttft), (self.tpot, record.tpot), (self.e2e, record.latency))
        return all(limit is None or time is None or time * 1e3 <= limit for limit, time in times)


def run_metrics(records: Sequence[RequestRecord], slo: Slo | None = None) -> Metrics:
    """The numbers of one run: counts, rates over the time from the first request to the last token, distributions.

    Times are in milliseconds, rates per second. Requests that failed are counted, and in no other number.
    """
    done = [record for record in records if record.error is None and record.tokens]
    metrics: Metrics = {
        "requests": float(len(records)),
        "failed": float(len(records) - len(done)),
        "prompt_tokens": float(sum(record.prompt_tokens for record in done)),
        "output_tokens": float(sum(record.output_tokens for record in done)),
    }
    duration = max(r.end for r in done) - min(r.start for r in records) if done else None
    metrics["duration_s"] = duration
    metrics["output_tokens_per_s"] = _rate(metrics["output_tokens"], duration)
    metrics["requests_per_s"] = _rate(float(len(done)), duration)
    if slo is not None:
        metrics["goodput_per_s"] = _rate(float(sum(slo.met_by(record) for record in records)), duration)
    lags = [record.lag for record in records if record.lag is not None]
    if lags:
        metrics["send_lag_ms.max"] = 1e3 * max(lags)
    metrics |= distribution("ttft_ms", [1e3 * r.ttft for r in done])
    metrics |= distribution("tpot_ms", [1e3 * tpot for r in done if (tpot := r.tpot) is not None])
    metrics |= distribution("itl_ms", [1e3 * gap for r in done for gap in r.gaps()])
    metrics |= distribution("e2e_ms", [1e3 * r.latency for r in done])
    return metrics


def _rate(count: float | None, duration: float | None) -> float | None:
    return count / duration if duration and count is not None else None


def distribution(name: str, values: Sequence[float]) -> Metrics:
    """`name`.mean and its percentiles (linear interpolation between the two nearest values)."""
    if not values:
        return {f"{name}.{key}": None for key in ("mean", *(f"p{p}" for p in PERCENTILES))}
    metrics: Metrics = {f"{name}.mean": float(np.mean(values))}
    for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
        metrics[f"{name}.p{p}"] = float(value)
    return metrics


class Spread(TypedDict):
    """A number over the repeats."""

    median: float
    min: float
    max: float


def spread(values: Sequence[float | None]) -> Spread | None:
    """Median and range of what is there; None when nothing is."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    return {"median": float(np.median(known)), "min": min(known), "max": max(known)}


def over_repeats(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Spread]:
    """Each metric's median and range over repeats; metrics that no run has are left out."""
    names = {name: None for run in runs for name in run}
    spreads = {name: spread([run.get(name) for run in runs]) for name in names}
    return {name: value for name, value in spreads.items() if value is not None}


def paired_ratio(
    runs: Sequence[Mapping[str, float | None]], base: Sequence[Mapping[str, float | None]], name: str
) -> Spread | None:
    """runs / base of one metric, repeat by repeat.

    The runs of one repeat follow one another within seconds to minutes, so a machine that becomes slower in the
    course of the whole measurement moves both sides of each ratio.
    """
    pairs = [(run.get(name), other.get(name)) for run, other in zip(runs, base, strict=False)]
    return spread([a / b for a, b in pairs if a is not None and b])
