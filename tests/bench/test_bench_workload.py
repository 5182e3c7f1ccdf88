"""What is asked of a server: lengths, arrivals, popularity, files."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hydraserve.bench.workload import (
    Lengths,
    Load,
    Workload,
    arrivals,
    assign_models,
    read_sharegpt,
)
from hydraserve.errors import ConfigError

MODELS = [f"a{i}" for i in range(8)]
BATCH = Load(concurrency=4)


def test_fixed_lengths_and_models_in_turn() -> None:
    requests = Workload(1000, Lengths(5, 5), Lengths(7, 7)).requests(10, MODELS, BATCH, seed=3)
    assert {len(r.prompt) for r in requests} == {5}
    assert {r.output_tokens for r in requests} == {7}
    assert [r.model for r in requests] == [f"a{i % 8}" for i in range(10)]
    assert all(0 <= token < 1000 for r in requests for token in r.prompt)
    assert len({r.prompt for r in requests}) == 10
    assert {r.at for r in requests} == {0.0}


def test_a_range_of_lengths_reaches_both_ends() -> None:
    requests = Workload(1000, Lengths(1, 3), Lengths(4, 6)).requests(100, MODELS, BATCH, seed=0)
    assert {len(r.prompt) for r in requests} == {1, 2, 3}
    assert {r.output_tokens for r in requests} == {4, 5, 6}


def test_every_arm_of_a_repeat_gets_the_same_prompts_and_each_repeat_others() -> None:
    workload = Workload(1000)
    base = workload.requests(6, ["base"], BATCH, seed=1)
    adapters = workload.requests(6, MODELS, BATCH, seed=1)
    assert [r.prompt for r in base] == [r.prompt for r in adapters]
    assert not {r.prompt for r in base} & {r.prompt for r in workload.requests(6, ["base"], BATCH, seed=2)}


@pytest.mark.parametrize("burstiness", [1.0, 0.25, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    times = arrivals(5.0, burstiness, 20_000, np.random.default_rng(0))
    gaps = np.array([b - a for a, b in pairwise(times)])
    assert times[0] == 0.0
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    # A gamma distribution's coefficient of variation is 1 / sqrt(shape); 1 is Poisson.
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_few_arrivals_have_the_rate_exactly(count: int) -> None:
    spans = [arrivals(4.0, 1.0, count, np.random.default_rng(seed))[-1] for seed in range(5)]
    assert spans == pytest.approx([(count - 1) / 4.0] * 5)


def test_popularity() -> None:
    counts = {mix: Counter(assign_models(mix, 4000, MODELS, 0)) for mix in ("identical", "distinct", "uniform", "zipf")}
    assert len(counts["identical"]) == 1
    assert set(counts["distinct"].values()) == {500}
    assert set(counts["uniform"]) == set(MODELS)
    assert max(counts["uniform"].values()) < 600
    # P(1) = 1 / zeta(1.5) = 0.383
    assert counts["zipf"].most_common(1)[0][1] / 4000 == pytest.approx(0.383, abs=0.03)


@pytest.mark.parametrize("text", ["", "0", "5-3", "a", "-4", "1-2-3"])
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--input-len"):
        Lengths.parse(text, "--input-len")


def test_lengths_are_parsed_and_printed() -> None:
    assert Lengths.parse("64", "-") == Lengths(64, 64)
    assert str(Lengths.parse("32-128", "-")) == "32-128"
    assert str(Lengths(9, 9)) == "9"


@pytest.mark.parametrize(
    "load",
    [
        *({}, {"concurrency": 1, "rate": 1.0}, {"concurrency": 0}, {"rate": -1.0}, {"rate": 1.0, "burstiness": 0}),
        *({"rate": float("nan")}, {"rate": 1.0, "burstiness": float("nan")}, {"rate": float("inf")}),
    ],
)
def test_bad_loads_are_refused(load: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="load"):
        Load(**load)  # type: ignore[arg-type]


class Words:
    """A tokenizer of words."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


def conversation(prompt_words: int, answer_words: int) -> dict[str, object]:
    turns = [("human", prompt_words), ("gpt", answer_words), ("human", 3)]
    return {"id": "x", "conversations": [{"from": who, "value": "word " * n} for who, n in turns]}


def test_sharegpt_takes_the_first_exchange_and_leaves_out_extremes(tmp_path: Path) -> None:
    file = tmp_path / "sharegpt.json"
    sizes = [(10, 20), (3, 20), (10, 3), (1025, 10), (1000, 1049), (1024, 1024)]
    file.write_text(json.dumps([*(conversation(*size) for size in sizes), {"conversations": []}, {"id": "y"}]))
    read = read_sharegpt(file, Words())
    assert [(len(prompt), output) for prompt, output in read] == [(10, 20), (1024, 1024)]
    workload = Workload(1000, conversations=read)
    assert workload.longest == 2048
    requests = workload.requests(50, MODELS, BATCH, 0)
    assert {(len(r.prompt), r.output_tokens) for r in requests} == {(10, 20), (1024, 1024)}


@pytest.mark.parametrize("text", ["[]", "{}", "not json", '[{"conversations": [1, 2]}]', '[{"conversations": 5}]'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="--dataset"):
        read_sharegpt(file, Words())
