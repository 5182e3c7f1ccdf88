"""The example mixtures: exact answers, deterministic, train and held-out apart by construction."""

from __future__ import annotations

import importlib.util
import json
import sys
from datetime import datetime
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "mixtures.py"


@pytest.fixture(scope="module")
def mixtures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_mixtures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["desk", "words"])
def test_parts_are_disjoint_and_complete(mixtures: ModuleType, name: str) -> None:
    parts = [mixtures.records(name, held_out=held_out, per_task=60, seed=seed) for held_out, seed in ((0, 0), (1, 5))]
    asked = [{(row["task"], row["input"]) for row in part} for part in parts]
    assert [len(part) for part in asked] == [300, 300]
    assert not asked[0] & asked[1]
    assert {row["task"] for row in parts[0]} == set(mixtures.MIXTURES[name])
    assert len(mixtures.MIXTURES[name]) >= 4


def test_same_arguments_same_bytes(mixtures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = []
    for folder in ("a", "b"):
        arguments = ["mixtures.py", "words", "--output", str(tmp_path / folder), "--train", "30", "--held-out", "10"]
        monkeypatch.setattr(sys, "argv", arguments)
        mixtures.main()
        contents.append([(tmp_path / folder / f"{part}.jsonl").read_bytes() for part in ("train", "held_out")])
    assert contents[0] == contents[1]
    assert [part.count(b"\n") for part in contents[0]] == [150, 50]


def rows(mixtures: ModuleType, mixture: str, task: str) -> list[tuple[str, str]]:
    instruction, make = mixtures.MIXTURES[mixture][task]
    found = list(mixtures.questions(task, make, held_out=False, count=50, seed=1))
    assert instruction
    assert len(found) == 50
    return found


def test_answers_are_right(mixtures: ModuleType) -> None:
    for question, answer in rows(mixtures, "desk", "dates"):
        assert datetime.strptime(question, "%B %d, %Y").strftime("%Y-%m-%d") == answer
    for question, answer in rows(mixtures, "desk", "sort"):
        assert answer.split() == sorted(question.split())
    for question, answer in rows(mixtures, "desk", "lookup"):
        table, wanted = question.rstrip("?").split(". ")
        assert f"{wanted} {answer}" in table.split(", ")
    for question, answer in rows(mixtures, "desk", "extract"):
        assert all(str(value) in question for value in json.loads(answer).values())
    for question, answer in rows(mixtures, "desk", "translate"):
        words = {**mixtures.ADJECTIVES, **mixtures.NOUNS, **mixtures.VERBS}
        _, adjective, subject, verb, _, thing = question.split()
        assert answer == " ".join(words[w] for w in (adjective, subject, thing, verb))
    for question, answer in rows(mixtures, "words", "clock"):
        assert datetime.strptime(question, "%I:%M %p").strftime("%H:%M") == answer
    for question, answer in rows(mixtures, "words", "reverse"):
        assert question.split()[::-1] == answer.split()
    for question, answer in rows(mixtures, "words", "sentiment"):
        tones = [
            word.rstrip(".") in mixtures.GOOD for word in question.split() if word.rstrip(".") in tone_words(mixtures)
        ]
        assert answer == {(True, True): "positive", (False, False): "negative"}.get(tuple(tones), "mixed")


def tone_words(mixtures: ModuleType) -> tuple[str, ...]:
    return mixtures.GOOD + mixtures.BAD


def test_numbers_and_numerals(mixtures: ModuleType) -> None:
    assert mixtures.number_words(1) == "one"
    assert mixtures.number_words(342) == "three hundred forty-two"
    assert mixtures.number_words(7013) == "seven thousand thirteen"
    assert mixtures.number_words(9990) == "nine thousand nine hundred ninety"
    numerals = dict(rows(mixtures, "words", "roman"))
    values = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    for number, numeral in numerals.items():
        signs = [values[sign] for sign in numeral]
        total = sum(-v if v < max(signs[i:]) else v for i, v in enumerate(signs))
        assert total == int(number), numeral
