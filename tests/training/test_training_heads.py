"""Choosing the number of heads: data with a known number of groups."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hydraserve.training.data import DataError, Example, Turn
from hydraserve.training.heads import WORD, choose_heads, elbow, plot


def example(text: str) -> Example:
    return Example((Turn("user", text), Turn("assistant", "ok")), "test")


def topics(count: int, each: int = 40) -> list[Example]:
    """`count` groups of examples that share no word, each with ten words of its own."""
    rng = np.random.default_rng(0)
    texts = []
    for topic in range(count):
        words = [f"w{topic}x{i}" for i in range(10)]
        texts += [" ".join(rng.permutation(words)[:8]) for _ in range(each)]
    return [example(text) for text in texts]


@pytest.mark.parametrize("count", [3, 4, 6])
def test_kmeans_finds_the_number_of_topics(count: int) -> None:
    choice = choose_heads(topics(count))
    assert choice.heads == count
    assert choice.best_silhouette == count
    assert [c.k for c in choice.candidates] == list(range(1, 11))
    inertia = [c.inertia for c in choice.candidates]
    assert all(a >= b * 0.999 for a, b in pairwise(inertia))
    assert choose_heads(topics(count)) == choice


def test_kmeans_finds_topics_in_a_script_without_spaces() -> None:
    rng = np.random.default_rng(0)
    examples = []
    for topic in range(4):
        signs = [chr(0x4E00 + 20 * topic + i) for i in range(12)]
        examples += [example("".join(rng.permutation(signs)[:9])) for _ in range(30)]
    choice = choose_heads(examples)
    assert (choice.heads, choice.best_silhouette) == (4, 4)


def test_words_are_what_they_were_in_spaced_scripts() -> None:
    text = "Größe 12_a: naïve, слово x."
    assert re.findall(WORD, text) == re.findall(r"\w+", text)
    assert re.findall(WORD, "GPT把12カ国") == ["GPT", "把", "12", "カ", "国"]


def test_punctuation_alone_is_refused() -> None:
    signs = [Example((Turn("user", "?" * i), Turn("assistant", "!")), "test") for i in range(1, 6)]
    with pytest.raises(DataError, match=r"got examples of punctuation alone, expected words.*--heads 4"):
        choose_heads(signs)


@pytest.mark.parametrize("count", [3, 5])
def test_dbscan_finds_the_number_of_topics(count: int) -> None:
    choice = choose_heads(topics(count), method="dbscan")
    assert (choice.heads, choice.candidates) == (count, ())
    assert choice.noise < 0.3


def test_elbow_of_known_curves() -> None:
    assert elbow([10, 4, 1, 0.8, 0.6, 0.4]) == 2
    assert elbow([5, 4, 3, 2, 1]) == 0  # a straight line has none
    assert elbow([3, 3, 3]) == 0
    assert elbow([2, 1]) == 0


def test_too_few_examples() -> None:
    with pytest.raises(DataError, match=r"got 2 different examples, expected at least 3.*--heads 4"):
        choose_heads([example("one"), example("two"), example("one")])
    assert choose_heads([example(word) for word in ("one", "two", "three")]).heads == 2


def test_plot_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "heads.png"
    plot(choose_heads(topics(3), max_heads=4), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 5000
