"""Training data: files of the alpaca and of the ShareGPT/messages form, JSON or JSON lines.

One example, in any of the shapes that LLaMA-Factory users have:

    {"instruction": ..., "input": ..., "output": ...}      further: "system", "history": [[user, assistant], ...]
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}      further: "system"
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}

A message of either list may have either pair of keys. Other keys are ignored.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydraserve.errors import HydraServeError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
_Item = TypeVar("_Item")  # an example, whatever has become of it
SHAPES = '"instruction" and "output", "conversations", or "messages"'


class DataError(HydraServeError):
    """A data file or an example in it that cannot be used for training."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. role: "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation: an optional system turn, then user and assistant in turn, ending with the assistant.

    source: where it came from, for messages: "FILE, line 3", in a JSON array "FILE, line 9, example 3".
    """

    turns: tuple[Turn, ...]
    source: str

    @property
    def prompt(self) -> str:
        """Everything up to the last answer as plain text: what the example asks for."""
        return "\n".join(turn.content for turn in self.turns[:-1])


def load_examples(paths: Sequence[Path | str]) -> list[Example]:
    """All examples of all files, in order.

    Raises DataError, naming the file and the line, for what cannot be read.
    """
    examples: list[Example] = []
    for path in paths:
        found = [_parse(record, source) for record, source in _records(Path(path))]
        if not found:
            raise DataError(str(path), got="no examples", expected="at least one")
        examples += found
    return examples


def split(examples: Sequence[_Item], eval_share: float, seed: int) -> tuple[list[_Item], list[_Item]]:
    """(train, evaluation): a random share of the examples, at least one where `eval_share` > 0, is set aside.

    Raises DataError when that leaves nothing to train on.
    """
    if eval_share <= 0:
        return list(examples), []
    count = max(1, round(len(examples) * eval_share))
    if count >= len(examples):
        raise DataError(
            "evaluation split",
            got=f"{len(examples)} examples of which {eval_share:g} are set aside",
            expected="at least one example left to train on",
            fix="give more data, or a smaller --eval-share",
        )
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    return [e for i, e in enumerate(examples) if i not in chosen], [examples[i] for i in sorted(chosen)]


def _records(path: Path) -> Iterator[tuple[Any, str]]:
    """(record, source) for each example of one file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise DataError(str(path), got=e.strerror or str(e), expected="a readable .json or .jsonl file") from e
    except UnicodeDecodeError as e:
        number = e.object.count(b"\n", 0, e.start) + 1
        raise DataError(f"{path}, line {number}", got="bytes that are not UTF-8", expected="UTF-8 text") from e
    if text.lstrip().startswith("["):
        yield from _array(text, path)
        return
    # Not splitlines(): it also cuts at U+0085, U+2028 and others, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise _no_json(f"{path}, line {number}", e) from e
            yield record, f"{path}, line {number}"


def _array(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    """(record, source) for each element of a JSON array, one by one, because only so is it known where each begins."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")

    def skip(position: int) -> int:
        found = space.match(text, position)
        assert found  # it matches the empty string
        return found.end()

    position = skip(text.index("[") + 1)
    line, counted, number = 1, 0, 0
    try:
        while text[position : position + 1] != "]" or number:
            line, counted, number = line + text.count("\n", counted, position), position, number + 1
            record, end = decoder.raw_decode(text, position)
            yield record, f"{path}, line {line}, example {number}"
            position = skip(end)
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
            position = skip(position + 1)
        if (rest := skip(position + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, rest)
    except (ValueError, RecursionError) as e:
        if isinstance(e, json.JSONDecodeError):
            line = e.lineno
        raise _no_json(f"{path}, line {line}", e) from e


def _no_json(source: str, error: ValueError | RecursionError) -> DataError:
    """error: what the JSON decoder raised; one that names no place is for nesting, or a number, beyond its limits."""
    fault = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(source, got=f"no JSON: {fault}", expected="a JSON array of objects, or one object on each line")


def _parse(record: Any, source: str) -> Example:
    if not isinstance(record, dict):
        raise DataError(source, got=f"a {type(record).__name__}", expected=f"an object with {SHAPES}")
    if "conversations" in record:
        turns = _messages(record["conversations"], source)
    elif "messages" in record:
        turns = _messages(record["messages"], source)
    elif "instruction" in record and "output" in record:
        turns = _alpaca(record, source)
    else:
        keys = ", ".join(sorted(map(str, record))) or "no keys"
        raise DataError(source, got=keys, expected=SHAPES)
    if record.get("system"):
        turns = [Turn("system", _text(record["system"], "system", source)), *turns]
    _check_order(turns, source)
    return Example(tuple(turns), source)


def _alpaca(record: dict[str, Any], source: str) -> list[Turn]:
    turns = []
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{source}, history", got=repr(pair), expected="pairs [user, assistant]")
        turns += [Turn(role, _text(t, "history", source)) for role, t in zip(("user", "assistant"), pair, strict=True)]
    parts = [_text(record["instruction"], "instruction", source)]
    if record.get("input"):
        parts.append(_text(record["input"], "input", source))
    output = _text(record["output"], "output", source)
    return [*turns, Turn("user", "\n".join(parts)), Turn("assistant", output)]


def _messages(messages: Any, source: str) -> list[Turn]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(source, got=f"{type(messages).__name__} of messages", expected="a list of objects")
    turns = []
    for number, message in enumerate(messages, start=1):
        where = f"{source}, message {number}"
        role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
        role = ROLES.get(str(message.get(role_key)))
        if role is None:
            raise DataError(
                f"{where}, {role_key}", got=repr(message.get(role_key)), expected="one of " + ", ".join(ROLES)
            )
        turns.append(Turn(role, _text(message.get(content_key), content_key, where)))
    return turns


def _text(value: Any, key: str, source: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{source}, {key}", got=repr(value), expected="text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as e:  # JSON can write it as an escape, but no tokenizer takes it
        half = ascii(value[e.start])
        raise DataError(f"{source}, {key}", got=f"half a surrogate pair, {half}", expected="Unicode text") from e
    return value


def _check_order(turns: Sequence[Turn], source: str) -> None:
    roles = [turn.role for turn in turns]
    start = 1 if roles[:1] == ["system"] else 0
    body = roles[start:]
    if not body or len(body) % 2 or body != ["user", "assistant"] * (len(body) // 2):
        raise DataError(
            f"{source}, order of messages",
            got=" ".join(roles) or "none",
            expected="user and assistant in turn, ending with the assistant, after at most one system message",
        )
