"""A result as a picture: throughput and latency against load, and against the number of adapters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydraserve.bench.table import load_value, title
from hydraserve.errors import ConfigError

_METRICS = (("output_tokens_per_s", "output tokens / s"), ("tpot_ms.p50", "TPOT p50, ms"))

# label -> [(x, spread)]
_Lines = dict[str, list[tuple[float, Mapping[str, float]]]]


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: one row against load, one line an arm; one row against adapters, one line a load and kind.

    Markers are medians, bars the range over the repeats. Raises ConfigError when matplotlib is missing.
    """
    figure_class = _figure_class(path)
    figure = figure_class(figsize=(13, 10), layout="constrained")
    axes = figure.subplots(2, 2)
    open_loop = any(cell["load"]["rate"] is not None for cell in result["cells"])
    for column, (metric, name) in enumerate(_METRICS):
        _draw(axes[0][column], against_load(result, metric))
        axes[0][column].set(xlabel="requests / s" if open_loop else "batch (concurrent requests)", ylabel=name)
        _draw(axes[1][column], against_adapters(result, metric))
        axes[1][column].set(xlabel="different adapters (0: base only)", ylabel=name)
    figure.suptitle(title(result) + ("" if result["complete"] else " (partial)"))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def against_load(result: Mapping[str, Any], metric: str) -> _Lines:
    """One line for each arm: x is the concurrency or the rate."""
    lines: _Lines = defaultdict(list)
    for cell in result["cells"]:
        if metric in cell["over_repeats"]:
            lines[cell["label"]].append((load_value(cell), cell["over_repeats"][metric]))
    return dict(lines)


def against_adapters(result: Mapping[str, Any], metric: str) -> _Lines:
    """One line for each kind and shape of adapters under each load: x is the number of different adapters."""
    lines: _Lines = defaultdict(list)
    for cell in result["cells"]:
        if metric in cell["over_repeats"]:
            name = cell["label"].rpartition(", ")[0] if cell["adapters"] else cell["label"]
            load = "batch" if cell["load"]["rate"] is None else "requests/s"
            lines[f"{name}, {load} {load_value(cell):g}"].append((cell["adapters"], cell["over_repeats"][metric]))
    return dict(lines)


def _draw(axes: Any, lines: _Lines) -> None:
    """Values of x stand evenly spaced: 1, 8 and 32 say more that way than to scale."""
    places = {x: i for i, x in enumerate(sorted({x for points in lines.values() for x, _ in points}))}
    for label, points in lines.items():
        at = [places[x] for x, _ in points]
        middle = [spread["median"] for _, spread in points]
        low = [spread["median"] - spread["min"] for _, spread in points]
        high = [spread["max"] - spread["median"] for _, spread in points]
        axes.errorbar(at, middle, yerr=[low, high], marker="o", capsize=3, label=label)
    axes.set_xticks(list(places.values()), [f"{x:g}" for x in places])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.grid(alpha=0.3, which="both")
    if lines:
        axes.legend(fontsize=7)


def _figure_class(path: Path) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError(
            what=f"--plot {path}", got="no matplotlib", expected="matplotlib", fix="pip install matplotlib"
        ) from e
    return Figure
