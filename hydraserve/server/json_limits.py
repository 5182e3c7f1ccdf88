"""What JSON may look like before a parser sees it: UTF-8, not nested deeply, no integers that the engine cannot hold.

A body is as large and of whatever shape as its sender likes. So each check takes a few passes over it, whatever is in
it, made by bytes and arrays: 16 MiB take some tenths of a second. Loops of Python's own would take ten seconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hydraserve.errors import InvalidRequestError

# Schemas of tools and answers rarely reach 30; what parses JSON recursively gives up, or crashes, at some thousands.
MAX_NESTING = 100
# Of int64: the shortest integer that may not fit has as many digits.
_DIGITS = 19
_LARGEST = 2**63 - 1

# Bytes looked at together: what is made of them stays in the processor's cache.
_CHUNK = 1 << 17
_QUOTE = ord('"')
# Byte -> what it adds to the depth, as int8.
_STEPS = bytes({ord(c): 1 for c in "[{"}.get(i, {ord(c): 255 for c in "]}"}.get(i, 0)) for i in range(256))
_DIGITS_ALIKE = bytes.maketrans(b"123456789", b"0" * 9)
_EXPONENT, _SIGNS, _POINT, _MINUS = tuple(b"eE"), tuple(b"+-"), ord("."), ord("-")
# Of two windows of n digits that lie `step` apart, one of n + step is made: 1, 2, 4, 8, 16 and _DIGITS.
_DOUBLING = (1, 2, 4, 8, 3)


def check_json(body: bytes) -> None:
    """Raises InvalidRequestError. What else may be wrong with JSON is left to its parser."""
    check_text(body)
    many_brackets, long_number = _has_many_brackets(body), _has_long_number(body)
    if many_brackets or long_number:  # few requests have either
        outside = outside_strings(body)
        check_nesting(outside)
        check_integers(outside)


def check_other(body: bytes) -> None:
    """Raises InvalidRequestError for a body of another type that a route may parse as JSON all the same."""
    if _has_many_brackets(body):
        check_nesting(outside_strings(body))


def check_text(body: bytes) -> None:
    """Raises InvalidRequestError for what is not UTF-8; Python's parser would guess other encodings."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            "body", got=f"byte {body[error.start]:#04x} at {error.start}", expected="JSON in UTF-8", fix="encode it so"
        ) from None


def outside_strings(body: bytes) -> bytes:
    """JSON without what is in its strings: brackets, numbers, closing quotes. After an error in the JSON, where its
    parser stops, it may be anything."""
    if b"\\" in body:
        # Pairs first: of a run of backslashes that leaves one exactly when it escapes what follows.
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    pieces, inside = [], 0
    for data in _chunks(body):
        within = (np.cumsum(data == _QUOTE, dtype=np.uint8) + np.uint8(inside)) & 1
        inside = int(within[-1])
        pieces.append(data[within == 0].tobytes())
    return b"".join(pieces)


def check_nesting(outside: bytes) -> None:
    """Raises InvalidRequestError for JSON, given without its strings, that is nested too deeply."""
    depth = 0
    for data in _chunks(outside.translate(_STEPS)):
        depths = np.cumsum(data.view(np.int8), dtype=np.int32) + depth
        depth = int(depths[-1])
        if depths.max() > MAX_NESTING:
            raise InvalidRequestError(
                "body", got=f"JSON of more than {MAX_NESTING} levels", expected="fewer", fix="send flatter JSON"
            )


def check_integers(outside: bytes) -> None:
    """Raises InvalidRequestError for integers, in JSON given without its strings, that need more than 64 bits: what the
    engine is sent cannot hold them. Floats are not meant, however many digits they have."""
    data = np.frombuffer(b"  " + outside + b" ", np.uint8)  # there is something before and after each number
    starts, ends = _long_runs(data - np.uint8(ord("0")) < 10)
    before, after = data[starts - 1], data[ends]
    is_exponent = np.isin(before, _EXPONENT) | (np.isin(before, _SIGNS) & np.isin(data[starts - 2], _EXPONENT))
    is_float = is_exponent | (before == _POINT) | (after == _POINT) | np.isin(after, _EXPONENT)
    value = np.zeros(len(starts), np.uint64)
    for i in range(_DIGITS):  # all numbers of 19 digits fit uint64
        value = value * np.uint64(10) + (data[starts + i] - np.uint8(ord("0")))
    # JSON has no leading zeros, so more digits are a larger number.
    is_larger = (ends - starts > _DIGITS) | (value > np.uint64(_LARGEST) + (before == _MINUS))
    for i in np.flatnonzero(is_larger & ~is_float)[:1]:
        number = data[starts[i] : ends[i]].tobytes().decode()
        raise InvalidRequestError(
            "body", got=f"the number {number[:30]}...", expected="integers of 64 bits", fix="send smaller ones"
        )


def _long_runs(is_digit: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Begin and end of each run of _DIGITS digits or more. The first and the last are none."""
    here = is_digit  # becomes: whether so many digits begin here
    for step in _DOUBLING:
        here = here[:-step] & here[step:]
    return np.flatnonzero(here[1:] & ~here[:-1]) + 1, np.flatnonzero(here[:-1] & ~here[1:]) + _DIGITS


def _has_many_brackets(body: bytes) -> bool:
    return body.count(b"[") + body.count(b"{") > MAX_NESTING


def _has_long_number(body: bytes) -> bool:
    return b"0" * _DIGITS in body.translate(_DIGITS_ALIKE)


def _chunks(data: bytes) -> list[NDArray[np.uint8]]:
    return [np.frombuffer(data[i : i + _CHUNK], np.uint8) for i in range(0, len(data), _CHUNK)]
