"""How many heads: the number of clusters among the training examples (arXiv:2404.19245, section 3.2).

The paper groups the TF-IDF features of the corpus with k-means and takes the number of groups at the elbow of
the within-group distances. It names DBSCAN as an alternative that needs no range of k.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix  # type: ignore[import-untyped]
from sklearn.cluster import DBSCAN, KMeans  # type: ignore[import-untyped]
from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
from sklearn.metrics import silhouette_score  # type: ignore[import-untyped]
from sklearn.neighbors import NearestNeighbors  # type: ignore[import-untyped]
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from hydraserve.training.data import DataError, Example

MAX_EXAMPLES = 5000  # beyond this a random sample: k-means on more changes the elbow little and takes minutes
MAX_FEATURES = 4096
SILHOUETTE_SAMPLE = 1000  # silhouettes compare all pairs
DBSCAN_NEIGHBOURS = 5
DBSCAN_CORE_SHARE = 0.95  # of the examples; the rest may be noise
# Scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer): each of their characters
# counts as a word. As one word, a whole clause would be like no other.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+"  # numbers and single letters as well: short structured tasks consist of them

Points = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One k. inertia: sum of squared distances to the nearest centre. silhouette: -1 .. 1, None for k = 1."""

    k: int
    inertia: float
    silhouette: float | None


@dataclass(frozen=True, slots=True)
class HeadsChoice:
    """The suggestion and what it rests on.

    heads:           E, the number at the elbow ("kmeans") or of dense groups ("dbscan"); at least 2.
    method:          "kmeans" or "dbscan".
    candidates:      one entry a k, from 1; empty for DBSCAN.
    best_silhouette: the k whose groups are the most separate, as a second opinion; None for DBSCAN.
    noise:           share of examples in no group (DBSCAN), else 0.
    examples:        how many examples were looked at.
    """

    heads: int
    method: str
    candidates: tuple[Candidate, ...]
    best_silhouette: int | None
    noise: float
    examples: int


def choose_heads(
    examples: Sequence[Example], *, method: str = "kmeans", max_heads: int = 10, seed: int = 0
) -> HeadsChoice:
    """Suggest E for these examples. Deterministic for a seed.

    Raises DataError when there are too few different examples to form groups.
    """
    points = features(examples, seed)
    distinct = np.unique(points.toarray(), axis=0).shape[0]
    if distinct < 3:
        raise DataError(
            "choosing the number of heads",
            got=f"{distinct} different examples",
            expected="at least 3",
            fix="give more data, or the number itself: --heads 4",
        )
    if method == "dbscan":
        return _by_dbscan(points)
    return _by_kmeans(points, min(max_heads, distinct - 1), seed)


def features(examples: Sequence[Example], seed: int) -> csr_matrix:
    """[examples, words] TF-IDF of the whole text of each example, rows of length one; at most MAX_EXAMPLES rows."""
    if len(examples) > MAX_EXAMPLES:
        examples = random.Random(seed).sample(list(examples), MAX_EXAMPLES)
    texts = [" ".join(turn.content for turn in example.turns) for example in examples]
    vectorizer = TfidfVectorizer(max_features=MAX_FEATURES, sublinear_tf=True, token_pattern=WORD)
    try:
        return csr_matrix(vectorizer.fit_transform(texts))
    except ValueError as e:  # scikit-learn's "empty vocabulary"
        raise DataError(
            "choosing the number of heads",
            got="examples of punctuation alone",
            expected="words",
            fix="give the number itself: --heads 4",
        ) from e


def elbow(values: Sequence[float]) -> int:
    """Index of the point of a falling curve that lies farthest below the line between its ends.

    Both axes are scaled to 0 .. 1 first, as in Kneedle (Satopaa et al., 2011, without its smoothing).
    """
    curve = np.asarray(values, dtype=np.float64)
    span = curve[0] - curve[-1]
    if len(curve) < 3 or span <= 0:
        return 0
    falling = (curve - curve[-1]) / span
    line = np.linspace(1, 0, len(curve))
    return int(np.argmax(line - falling))


def _by_kmeans(points: csr_matrix, max_heads: int, seed: int) -> HeadsChoice:
    candidates = []
    for k in range(1, max_heads + 1):
        with threadpool_limits(1):  # many short steps: more threads would mostly wait for one another
            model = KMeans(n_clusters=k, n_init=5, random_state=seed).fit(points)
        candidates.append(Candidate(k, float(model.inertia_), _silhouette(points, model.labels_, seed)))
    at_elbow = candidates[elbow([c.inertia for c in candidates])].k
    best = max(candidates[1:], key=lambda c: c.silhouette if c.silhouette is not None else -1.0)
    return HeadsChoice(max(2, at_elbow), "kmeans", tuple(candidates), best.k, 0.0, points.shape[0])


def _silhouette(points: csr_matrix, labels: NDArray[np.int64], seed: int) -> float | None:
    if len(np.unique(labels)) < 2:
        return None
    size = min(SILHOUETTE_SAMPLE, points.shape[0])
    try:
        return float(silhouette_score(points, labels, sample_size=size, random_state=seed))
    except ValueError:  # the sample fell into one group
        return None


def _by_dbscan(points: csr_matrix) -> HeadsChoice:
    """Density groups; the radius is the one within which nearly every example has five neighbours."""
    neighbours = min(DBSCAN_NEIGHBOURS, points.shape[0] - 1)
    distances, _ = NearestNeighbors(n_neighbors=neighbours + 1).fit(points).kneighbors(points)
    radius = max(float(np.quantile(distances[:, -1], DBSCAN_CORE_SHARE)), 1e-9)
    labels = DBSCAN(eps=radius, min_samples=neighbours).fit(points).labels_
    groups = len(set(labels.tolist()) - {-1})
    return HeadsChoice(max(2, groups), "dbscan", (), None, float((labels == -1).mean()), points.shape[0])


def plot(choice: HeadsChoice, path: Path) -> None:
    """The curve of k-means and the silhouettes, with the choice marked, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes: Any = figure.add_subplot()
    ks = [c.k for c in choice.candidates]
    axes.plot(ks, [c.inertia for c in choice.candidates], "o-", label="distance to the centres")
    axes.axvline(choice.heads, linestyle="--", color="gray", label=f"elbow: {choice.heads} heads")
    axes.set(xlabel="groups (heads)", ylabel="sum of squared distances", xticks=ks)
    right: Any = axes.twinx()
    scored = [(c.k, c.silhouette) for c in choice.candidates if c.silhouette is not None]
    right.plot([k for k, _ in scored], [s for _, s in scored], "s:", color="tab:orange", label="silhouette")
    right.set_ylabel("silhouette")
    figure.legend(loc="outside lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
