"""Reading alpaca and ShareGPT/messages files, and saying where a fault is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hydraserve.training.data import DataError, Example, Turn, load_examples, split

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def write(path: Path, records: list[Any], *, lines: bool) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1), encoding="utf-8")
    return path


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize(
    "record",
    [
        ALPACA,
        {"instruction": "Add.\n1 2", "output": "3", "task": "sums"},
        {"conversations": [{"from": "human", "value": "Add.\n1 2"}, {"from": "gpt", "value": "3"}]},
        {"messages": [{"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}]},
        {"conversations": [{"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}]},
    ],
)
def test_every_shape_gives_the_same_example(tmp_path: Path, record: dict[str, Any], lines: bool) -> None:
    path = write(tmp_path / "data.json", [record, record], lines=lines)
    first, second = load_examples([path])
    assert first.turns == second.turns == (Turn("user", "Add.\n1 2"), Turn("assistant", "3"))
    line = 2 if lines else path.read_text().splitlines()[2:].index(" {") + 3
    assert second.source == f"{path}, line {line}" + ("" if lines else ", example 2")


def test_system_history_and_several_files(tmp_path: Path) -> None:
    one = write(tmp_path / "a.json", [ALPACA | {"system": "Be brief.", "history": [["hi", "hello"]]}], lines=False)
    two = write(tmp_path / "b.jsonl", [{"conversations": CONVERSATION}], lines=True)
    first, second = load_examples([one, two])
    assert [t.role for t in first.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [t.content for t in second.turns] == ["s", "q1", "a1", "q2", "a2"]
    assert second.prompt == "s\nq1\na1\nq2"


CONVERSATION = [
    {"from": "system", "value": "s"},
    {"from": "user", "value": "q1"},
    {"from": "assistant", "value": "a1"},
    {"from": "human", "value": "q2"},
    {"from": "gpt", "value": "a2"},
]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "line 2: got a list, expected an object"),
        ({"text": "x"}, 'line 2: got text, expected "instruction" and "output"'),
        (ALPACA | {"output": ""}, "line 2, output: got '', expected text"),
        (ALPACA | {"instruction": 7}, "line 2, instruction: got 7"),
        (ALPACA | {"history": [["only one"]]}, "line 2, history: got"),
        (ALPACA | {"output": "\ud83d"}, r"line 2, output: got half a surrogate pair, '\ud83d'"),
        ({"messages": "hello"}, "line 2: got str of messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "line 2, message 1, role: got 'robot'"),
        ({"conversations": CONVERSATION[1:2]}, "line 2, order of messages: got user"),
        ({"conversations": CONVERSATION[2:]}, "line 2, order of messages: got assistant user assistant"),
    ],
)
def test_bad_examples_name_file_and_line(tmp_path: Path, record: Any, message: str) -> None:
    path = write(tmp_path / "data.jsonl", [ALPACA, record], lines=True)
    with pytest.raises(DataError) as caught:
        load_examples([path])
    assert str(caught.value).startswith(f"{path}, {message}")


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ALPACA) + '\n\n{"instruction": \n')
    with pytest.raises(DataError, match=r"data\.jsonl, line 3: got no JSON"):
        load_examples([path])


def test_only_line_breaks_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    text = "a\u2028b\u2029c\x85d"
    path.write_text("\r\n".join(json.dumps(ALPACA | {"output": text}, ensure_ascii=False) for _ in "12"))
    assert [(e.turns[-1].content, e.source) for e in load_examples([path])] == [
        (text, f"{path}, line 1"),
        (text, f"{path}, line 2"),
    ]


@pytest.mark.parametrize("array", [True, False])
@pytest.mark.parametrize(
    ("broken", "message"),
    [('{"a": ' + "[" * 100_000, "recursion depth"), ('{"a": ' + "1" * 5000 + "}", "integer string")],
)
def test_json_beyond_the_decoders_limits_names_the_line(tmp_path: Path, broken: str, message: str, array: bool) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"[\n{json.dumps(ALPACA)},\n{broken}" if array else f"{json.dumps(ALPACA)}\n{broken}")
    with pytest.raises(DataError, match=rf"data\.jsonl, line {3 if array else 2}: got no JSON: .*{message}"):
        load_examples([path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"instruction": 1,\n}]', "line 3: got no JSON: "),
        ("[\n{A}\n{A}]", "line 3: got no JSON: Expecting ',' delimiter at column 1"),
        ("[\n{A},\n]", "line 3: got no JSON: Expecting value"),
        ("[\n{A}", "line 2: got no JSON: Expecting ',' delimiter"),
        ("[{A}]\n\n{A}", "line 3: got no JSON: Extra data"),
        ('[\n{A},\n{"instruction": "a",\n"output": 5}]', "line 3, example 2, output: got 5"),
        ('[{A}, {"text": 1}]', "line 1, example 2: got text, expected"),
    ],
)
def test_faults_in_an_array_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "inline.json"
    path.write_text(text.replace("{A}", json.dumps(ALPACA)))
    with pytest.raises(DataError) as caught:
        load_examples([path])
    assert str(caught.value).startswith(f"{path}, {message}")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: got No such file"):
        load_examples([tmp_path / "none.json"])
    (tmp_path / "latin.json").write_bytes(b'[\n{"instruction": "\xe9"}]')
    with pytest.raises(DataError, match=r"latin\.json, line 2: got bytes that are not UTF-8"):
        load_examples([tmp_path / "latin.json"])
    (tmp_path / "empty.json").write_text("[]")
    good = write(tmp_path / "good.jsonl", [ALPACA], lines=True)
    with pytest.raises(DataError, match=r"empty\.json: got no examples, expected at least one"):
        load_examples([good, tmp_path / "empty.json"])


def examples(count: int) -> list[Example]:
    return [Example((Turn("user", str(i)), Turn("assistant", "x")), f"line {i}") for i in range(count)]


def test_split_is_a_partition_that_depends_on_the_seed_only() -> None:
    everything = examples(50)
    train, held = split(everything, 0.1, seed=3)
    assert (len(train), len(held)) == (45, 5)
    assert sorted(train + held, key=everything.index) == everything
    assert split(everything, 0.1, seed=3) == (train, held)
    assert split(everything, 0.1, seed=4) != (train, held)
    assert split(everything, 0, seed=3) == (everything, [])
    with pytest.raises(DataError, match="evaluation split"):
        split(examples(1), 0.5, seed=0)
