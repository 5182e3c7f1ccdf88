"""A result and its file: every run, what they come to, and where they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydraserve.bench.arms import Arm
from hydraserve.bench.stats import Metrics, Spread, over_repeats, paired_ratio
from hydraserve.bench.workload import Load
from hydraserve.errors import ConfigError

KIND, SCHEMA = "hydraserve bench", 1

# Metrics whose ratio to the baseline arm is of interest.
RATIOS = ("output_tokens_per_s", "ttft_ms.p50", "tpot_ms.p50", "itl_ms.p99")


@dataclass
class CellRuns:
    """One arm under one load, and its runs in the order of the repeats."""

    arm: Arm
    load: Load
    metrics: list[Metrics] = field(default_factory=list)
    counters: list[dict[str, float]] = field(default_factory=list)
    errors: list[list[str]] = field(default_factory=list)

    def add(self, metrics: Metrics, counters: dict[str, float], errors: Sequence[str]) -> None:
        self.metrics.append(metrics)
        self.counters.append(counters)
        self.errors.append(list(errors))


@dataclass(frozen=True)
class LeftOut:
    """A cell that is not measured, and why."""

    arm: Arm
    load: Load
    why: str

    @property
    def text(self) -> str:
        return f"{self.arm.label} at {self.load.label}: {self.why}"

    def to_json(self) -> dict[str, Any]:
        return {"arm": self.arm.name, "label": self.arm.label, "load": _load(self.load), "why": self.why}


@dataclass
class Result:
    """about: whatever says what was measured and where. baseline: name of the arm that ratios are to."""

    about: dict[str, Any]
    baseline: str | None = None
    cells: list[CellRuns] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False
    stopped_by: str | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    def to_json(self) -> dict[str, Any]:
        """The result file: see docs/benchmarks.md for its fields."""
        now = datetime.now(UTC)
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "complete": self.complete,
            "stopped_by": self.stopped_by,
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round((now - self.started).total_seconds()),
            **self.about,
            "baseline": self.baseline,
            "servers": self.servers,
            "left_out": [item.to_json() for item in self.left_out],
            "cells": [self._cell(cell) for cell in self.cells if cell.metrics],
        }

    def _cell(self, cell: CellRuns) -> dict[str, Any]:
        runs = [
            {"metrics": metrics, "counters": counters} | ({"errors": errors} if errors else {})
            for metrics, counters, errors in zip(cell.metrics, cell.counters, cell.errors, strict=True)
        ]
        arm, load = cell.arm, cell.load
        return {
            "arm": arm.name,
            "label": arm.label,
            "kind": arm.kind,
            "shape": arm.shape,
            "server": arm.server,
            "adapters": arm.adapters,
            "load": _load(load),
            "over_repeats": over_repeats(cell.metrics),
            "ratios": self._ratios(cell),
            "runs": runs,
        }

    def _ratios(self, cell: CellRuns) -> dict[str, Spread]:
        """To the baseline arm under the same load."""
        base = next((c for c in self.cells if c.arm.name == self.baseline and c.load == cell.load), None)
        if base is None or base is cell:
            return {}
        ratios = {name: paired_ratio(cell.metrics, base.metrics, name) for name in RATIOS}
        return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def _load(load: Load) -> dict[str, float | None]:
    return {"concurrency": load.concurrency, "rate": load.rate, "burstiness": load.burstiness}


def save(result: Mapping[str, Any], path: Path) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def load(path: Path) -> dict[str, Any]:
    """A result file. Raises ConfigError when it is none."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if result["kind"] != KIND or result["schema"] != SCHEMA:
            raise ValueError(f"kind {result['kind']!r}, schema {result['schema']}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            what=f"result file {path}",
            got=f"{type(e).__name__}: {e}",
            expected=f"a file that `hydraserve bench` wrote (schema {SCHEMA})",
            fix="measure again with this version",
        ) from e
    return result
