"""The asymmetry of A and B (arXiv:2404.19245, figure 2): across adapters, A stays alike and B does not.

Every adapted layer gives one A and one B (for HydraLoRA: one B a head), of every given adapter. Two of them are
compared by the spaces they span, so adapters of different rank compare too, and the basis does not matter, which
training leaves free: (B M)(M^-1 A) is the same adapter as B A.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.manifold import TSNE  # type: ignore[import-untyped]
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from hydraserve.adapters.weights import HydraAdapter, natural_order
from hydraserve.errors import ConfigError

Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")
FEWEST_FOR_TSNE = 5


@dataclass(frozen=True, slots=True)
class Matrix:
    """One A or one B.

    basis: [k, n] orthonormal rows spanning what A reads (n = in) or what a head of B writes (n = out); k <= rank.
    """

    adapter: str
    module: str
    side: Side
    head: int
    basis: torch.Tensor

    @property
    def kind(self) -> str:
        """Last component of the path: "q_proj"."""
        return self.module.rpartition(".")[2]

    @property
    def width(self) -> int:
        """n; matrices of different widths do not compare."""
        return self.basis.shape[1]


@dataclass(frozen=True, slots=True)
class Point:
    """A matrix in the picture of its side, kind of layer and width; coordinates of other pictures do not compare."""

    adapter: str
    module: str
    kind: str
    side: Side
    head: int
    width: int
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Similarity:
    """Mean over pairs of matrices that stand in the same layer, 0 to 1.

    across: pairs from two different adapters. within: pairs of heads of one adapter (B only).
    None where there are no such pairs.
    """

    across: float | None
    within: float | None


@dataclass(frozen=True, slots=True)
class Asymmetry:
    """a, b: how alike the A's and the B's are. asymmetry: a.across - b.across (None for one adapter)."""

    adapters: tuple[str, ...]
    a: Similarity
    b: Similarity
    asymmetry: float | None
    points: tuple[Point, ...]


def analyze(adapters: Mapping[str, HydraAdapter], *, perplexity: float = 30.0, seed: int = 0) -> Asymmetry:
    """Compare adapters, by name, and place their matrices in the plane: t-SNE for each side, kind of layer and width.

    Raises ConfigError when several adapters are given that share no layer, or one of different sizes.
    """
    _check_one_base(adapters)
    groups: dict[tuple[Side, str, int], list[Matrix]] = defaultdict(list)
    for name, adapter in adapters.items():
        for m in _matrices(name, adapter):
            groups[m.side, m.kind, m.width].append(m)
    across: dict[Side, list[float]] = {"A": [], "B": []}
    within: dict[Side, list[float]] = {"A": [], "B": []}
    points: list[Point] = []
    for (side, *_), group in sorted(groups.items()):
        similar = similarities([m.basis for m in group])
        for i, j in _same_layer(group):
            pairs = within if group[i].adapter == group[j].adapter else across
            pairs[side].append(float(similar[i, j]))
        places = _place(np.sqrt(np.clip(1 - similar, 0, None)), perplexity, seed)
        points += [
            Point(m.adapter, m.module, m.kind, m.side, m.head, m.width, float(x), float(y))
            for m, (x, y) in zip(group, places, strict=True)
        ]
    a, b = (Similarity(_mean(across[side]), _mean(within[side])) for side in SIDES)
    asymmetry = None if a.across is None or b.across is None else a.across - b.across
    return Asymmetry(tuple(adapters), a, b, asymmetry, tuple(points))


def _check_one_base(adapters: Mapping[str, HydraAdapter]) -> None:
    expected = "adapters of one base model"
    if len(adapters) > 1 and not set.intersection(*(set(adapter.modules) for adapter in adapters.values())):
        raise ConfigError("adapters", got="adapters that share no layer", expected=expected)
    seen: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, adapter in adapters.items():
        for module, weights in adapter.modules.items():
            size = weights.in_features, weights.out_features
            other, known = seen.setdefault(module, (name, size))
            if size != known:
                got = (
                    f"{module} from {known[0]} to {known[1]} features in {other}, from {size[0]} to {size[1]} in {name}"
                )
                raise ConfigError("adapters", got=got, expected=expected)


def similarities(bases: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """Overlap of the spaces of every two of n bases [k_i, d], [n, n]: 0 (orthogonal) to 1 (one holds the other).

    |Q_i Q_j^T|^2 / min(k_i, k_j), the measure of the LoRA paper (arXiv:2106.09685, section 7.2). 0 with a matrix
    that is zero, which spans nothing.
    """
    sizes = np.array([basis.shape[0] for basis in bases])
    full = np.flatnonzero(sizes)  # reduceat below knows no empty groups
    stacked = torch.cat(list(bases)).double().numpy()
    starts = np.concatenate([[0], np.cumsum(sizes[full])[:-1]]).astype(np.intp)
    squares = np.square(stacked @ stacked.T)
    sums = np.zeros((len(bases), len(bases)))
    if full.size:
        sums[np.ix_(full, full)] = np.add.reduceat(np.add.reduceat(squares, starts, axis=0), starts, axis=1)
    overlaps: NDArray[np.float64] = sums / np.maximum(np.minimum(sizes[:, None], sizes[None, :]), 1)
    return overlaps


def span(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows [k, n] spanning the rows of `matrix` [r, n]; k = 0 for a zero matrix."""
    _, values, rows = torch.linalg.svd(matrix.float(), full_matrices=False)
    spanning: torch.Tensor = rows[values > 1e-6 * values.max().clamp(min=1e-30)]
    return spanning


def _matrices(name: str, adapter: HydraAdapter) -> list[Matrix]:
    found = []
    for module in natural_order(adapter.modules):
        weights = adapter.modules[module]
        a = weights.a.view(-1, weights.layout.rank, weights.in_features)
        found += [Matrix(name, module, "A", i, span(rows)) for i, rows in enumerate(a)]
        found += [Matrix(name, module, "B", i, span(head.T)) for i, head in enumerate(weights.b)]
    return found


def _same_layer(group: Sequence[Matrix]) -> list[tuple[int, int]]:
    """All pairs of indices of matrices of one layer."""
    by_module: dict[str, list[int]] = defaultdict(list)
    for i, m in enumerate(group):
        by_module[m.module].append(i)
    return [(i, j) for members in by_module.values() for i in members for j in members if i < j]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _place(distances: NDArray[np.float64], perplexity: float, seed: int) -> NDArray[np.float64]:
    """[n, 2] from distances [n, n]. Too few for t-SNE are placed by classical scaling."""
    n = len(distances)
    if n >= FEWEST_FOR_TSNE:
        tsne = TSNE(metric="precomputed", init="random", perplexity=min(perplexity, (n - 1) / 3), random_state=seed)
        # A thousand steps of microseconds each: with more threads, most of the time goes into their meeting.
        with threadpool_limits(1):
            return np.asarray(tsne.fit_transform(distances), dtype=np.float64)
    centre = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(-0.5 * centre @ np.square(distances) @ centre)
    places = np.zeros((n, 2))
    top = (vectors * np.sqrt(np.clip(values, 0, None)))[:, ::-1][:, :2]
    places[:, : top.shape[1]] = top
    return places


def plot(result: Asymmetry, path: Path) -> None:
    """A grid of pictures as a PNG: A above, B below, one column a kind of layer and width, one colour an adapter."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    pictures = {side: sorted({(p.kind, p.width) for p in result.points if p.side == side}) for side in SIDES}
    columns = max(map(len, pictures.values()))
    figure = Figure(figsize=(2.2 * columns + 1, 5.5), layout="constrained")
    grid: Any = figure.subplots(2, columns, squeeze=False)
    colours = {name: colormaps["tab10"](i % 10) for i, name in enumerate(result.adapters)}
    for row, side in enumerate(SIDES):
        kinds = Counter(kind for kind, _ in pictures[side])
        for column, (kind, width) in enumerate(pictures[side]):
            axes = grid[row, column]
            group = [p for p in result.points if (p.side, p.kind, p.width) == (side, kind, width)]
            axes.scatter([p.x for p in group], [p.y for p in group], s=9, c=[colours[p.adapter] for p in group])
            title = f"{side} of {kind}" + (f", {width} wide" if kinds[kind] > 1 else "")
            axes.set(title=title, xticks=[], yticks=[])
        for axes in grid[row, len(pictures[side]) :]:
            axes.set_axis_off()
    if result.asymmetry is not None:
        figure.suptitle(f"alike across adapters: A {result.a.across:.3f}, B {result.b.across:.3f}")
    handles = [Line2D([], [], color=c, marker="o", linestyle="", label=name) for name, c in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
