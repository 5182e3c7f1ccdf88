"""The exception tree: its drawing, its messages, and that errors survive the way between processes."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from hydraserve import errors
from hydraserve.errors import AdapterError, BaseShapeError, HydraServeError, ShapeError

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, HydraServeError)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_error_survives_pickling_and_copying(cls: type[HydraServeError]) -> None:
    error = cls("r", got=0, expected="at least 1", fix="set r")
    error.where = "adapter ./a"
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is cls
        assert str(twin) == str(error)
        assert (twin.what, twin.got, twin.expected, twin.fix, twin.where) == (
            "r", "0", "at least 1", "set r", "adapter ./a",
        )  # fmt: skip


def test_the_docstring_draws_every_class_below_its_parent() -> None:
    drawn: dict[str, int] = {}
    lines = [line for line in (errors.__doc__ or "").splitlines() if "Error " in line or line.endswith("Error")]
    for line in lines:
        name = line.strip("│├└─ ").split()[0]
        if name in {c.__name__ for c in CLASSES}:
            drawn[name] = len(line) - len(line.lstrip("│├└─ "))
    assert set(drawn) == {c.__name__ for c in CLASSES}
    for cls in CLASSES[:]:
        if cls is not HydraServeError:
            assert drawn[cls.__name__] > drawn[cls.__mro__[1].__name__]


def test_a_message_says_got_expected_and_fix_on_one_line() -> None:
    assert str(AdapterError("r", got=0, expected="at least 1", fix="set r", where="adapter ./a")) == (
        "adapter ./a: r: got 0, expected at least 1. To fix: set r"
    )
    assert str(AdapterError("r", got=0)) == "r: got 0"
    assert str(AdapterError("no such thing")) == "no such thing"


def test_what_a_message_quotes_cannot_break_the_line_or_flood_it() -> None:
    text = str(AdapterError("r", got="one\ntwo\x1b[31m" + "x" * 100_000))
    assert "one\\ntwo\\x1b[31m" in text
    assert "\n" not in text
    assert len(text) < 1000


def test_a_module_of_another_size_is_both_kinds_of_fault() -> None:
    assert issubclass(BaseShapeError, ShapeError)
    assert issubclass(BaseShapeError, errors.BaseMismatchError)
