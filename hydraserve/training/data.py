"""Training data: files of the alpaca and of the ShareGPT/messages form, JSON or JSON lines.

One example, in any of the shapes that LLaMA-Factory users have:

    {"instruction": ..., "input": ..., "output": ...}      further: "system", "history": [[user, assistant], ...]
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}      further: "system"
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}

Other keys are ignored.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydraserve.errors import HydraServeError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
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

    source: where it came from, for messages: "FILE, line 3" or "FILE, example 3" (both count from 1).
    """

    turns: tuple[Turn, ...]
    source: str

    @property
    def prompt(self) -> str:
        """Everything up to the last answer as plain text: what the example asks for."""
        return "\n".join(turn.content for turn in self.turns[:-1])


def load_examples(paths: Sequence[Path | str]) -> list[Example]:
    """All examples of all files, in order.

    Raises DataError, naming the file and the line or the example, for what cannot be read.
    """
    examples = [_parse(record, source) for path in paths for record, source in _records(Path(path))]
    if not examples:
        raise DataError("training data", got="no examples in " + ", ".join(map(str, paths)), expected="at least one")
    return examples


def split(examples: Sequence[Example], eval_share: float, seed: int) -> tuple[list[Example], list[Example]]:
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
        raise DataError(str(path), got=f"bytes that are not UTF-8 at offset {e.start}", expected="UTF-8 text") from e
    if text.lstrip().startswith("["):
        for index, record in enumerate(_json(text, str(path)), start=1):
            yield record, f"{path}, example {index}"
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            source = f"{path}, line {number}"
            yield _json(line, source), source


def _json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        where = f"{source}, line {e.lineno}" if "line" not in source else source
        raise DataError(
            where,
            got=f"no JSON: {e.msg} at column {e.colno}",
            expected="a JSON array of objects, or one object on each line",
        ) from e


def _parse(record: Any, source: str) -> Example:
    if not isinstance(record, dict):
        raise DataError(source, got=f"a {type(record).__name__}", expected=f"an object with {SHAPES}")
    if "conversations" in record:
        turns = _messages(record["conversations"], "from", "value", source)
    elif "messages" in record:
        turns = _messages(record["messages"], "role", "content", source)
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


def _messages(messages: Any, role_key: str, content_key: str, source: str) -> list[Turn]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(source, got=f"{type(messages).__name__} of messages", expected="a list of objects")
    turns = []
    for number, message in enumerate(messages, start=1):
        where = f"{source}, message {number}"
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
