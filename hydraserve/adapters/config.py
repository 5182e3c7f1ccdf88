"""adapter_config.json: its fields, typed and checked, as far as all formats share them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import regex

from hydraserve.adapters.files import JsonError, open_regular, parse_object, unreadable
from hydraserve.adapters.limits import AdapterLimits
from hydraserve.errors import AdapterConfigError, HydraServeError, LimitError

_Number = TypeVar("_Number", int, float)
_LONGEST_PATTERN = 256


@dataclass(frozen=True)
class AdapterConfig:
    """One adapter_config.json. `fields` is the whole JSON object; the methods below check as they read."""

    fields: Mapping[str, Any]
    limits: AdapterLimits

    @property
    def peft_type(self) -> str:
        value: str = self._typed("peft_type", str, "a string such as 'LORA'")
        return value

    @property
    def base_model(self) -> str | None:
        if self.fields.get("base_model_name_or_path") is None:
            return None
        value: str = self._typed("base_model_name_or_path", str, "a string or null")
        return value

    @property
    def rank_stabilized(self) -> bool:
        """use_rslora (arXiv:2312.03732): the scaling is alpha / sqrt(r) instead of alpha / r."""
        return self.flag("use_rslora")

    def flag(self, name: str, default: bool = False) -> bool:
        """An optional field that is true or false. Raises AdapterConfigError."""
        if self.fields.get(name) is None:
            return default
        value: bool = self._typed(name, bool, "true or false")
        return value

    def number(self, name: str) -> float:
        """A required field that is a finite number. Raises AdapterConfigError."""
        return _finite(name, self._typed(name, (int, float), "a number"))

    def whole(self, name: str, default: int = 0) -> int:
        """An optional field that is a whole number of at least 0. Raises AdapterConfigError."""
        if self.fields.get(name) is None:
            return default
        value: int = self._typed(name, int, "a whole number of at least 0")
        if value < 0:
            raise _wrong(name, value, "at least 0")
        return value

    def scaling(self, rank: int, alpha: float) -> float:
        """s of a module."""
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def counts(self, name: str, pattern_name: str, limit: int, matcher: PatternMatcher) -> PerModule[int]:
        """A whole number of at least 1 for each module: the required field `name`, and the optional patterns.

        Raises AdapterConfigError, or LimitError when a number is over `limit`.
        """
        expected = "a whole number of at least 1"
        default = self._checked_count(name, self._typed(name, int, expected), limit)
        pattern = self._pattern(pattern_name, matcher)
        for key, value in pattern.items():
            if type(value) is not int:
                raise _wrong(f"{pattern_name}[{key!r}]", value, expected)
            self._checked_count(f"{pattern_name}[{key!r}]", value, limit)
        return PerModule(name, default, pattern, matcher)

    def alphas(self, matcher: PatternMatcher) -> PerModule[float]:
        """lora_alpha for each module: the required field and the optional alpha_pattern."""
        default = self.number("lora_alpha")
        pattern = self._pattern("alpha_pattern", matcher)
        for key, value in pattern.items():
            if type(value) not in (int, float):
                raise _wrong(f"alpha_pattern[{key!r}]", value, "a number")
            _finite(f"alpha_pattern[{key!r}]", value)
        return PerModule("lora_alpha", default, pattern, matcher)

    def check_targets(self, paths: Mapping[str, object], *, whole_components: bool) -> None:
        """Every module with tensors must be one that target_modules names: PEFT ignores the tensors of others.

        whole_components: PEFT's rule; otherwise the older one, that the module's path merely ends in the name.
        A string (a regular expression) is not checked: PEFT made it match when the adapter was trained.
        """
        targets = self.fields.get("target_modules")
        if targets is None or isinstance(targets, str):
            return
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise _wrong("target_modules", targets, "a list of names, or one string")
        dot = "." if whole_components else ""
        names, endings = set(targets), tuple(dot + name for name in targets)
        for path in paths:
            if path not in names and not path.endswith(endings):
                raise AdapterConfigError(
                    "target_modules",
                    got=f"{targets}",
                    expected=f"a name for the module {path}, for which there are tensors",
                    fix=f"add {path.rpartition('.')[2]!r}, or remove these tensors",
                )

    def _checked_count(self, name: str, value: int, limit: int) -> int:
        if value < 1:
            raise _wrong(name, value, "at least 1")
        self.limits.check(name, value, limit)
        return value

    def _typed(self, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
        if name not in self.fields:
            raise AdapterConfigError(
                name, got="no such field in adapter_config.json", expected=expected, fix="add the field"
            )
        value = self.fields[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:  # not isinstance: true is no rank
            raise _wrong(name, value, expected)
        return value

    def _pattern(self, name: str, matcher: PatternMatcher) -> Mapping[str, Any]:
        value = self.fields.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise _wrong(name, value, "an object of patterns and numbers, or null")
        self.limits.check(name, len(value), self.limits.tensors, unit=" patterns")
        for key in value:
            matcher.add(name, key)
        return value


def read_config(path: Path, limits: AdapterLimits) -> AdapterConfig:
    """Read adapter_config.json.

    Raises UnreadableFileError, LimitError, or AdapterConfigError when it is not a JSON object.
    """
    try:
        with open_regular(path) as file:
            data = file.read(limits.config_bytes + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    limits.check(f"size of {path.name}", len(data), limits.config_bytes, unit=" bytes")
    try:
        return AdapterConfig(parse_object(data), limits)
    except JsonError as fault:
        fix = "copy the file again, or correct it"
        raise AdapterConfigError(path.name, got=fault, expected="a JSON object", fix=fix) from fault


class PatternMatcher:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that, as a regular expression, matches the
    module's path or its ending after a dot. One time limit for all matches: the patterns come from the file.
    """

    def __init__(self, limits: AdapterLimits) -> None:
        self._deadline = time.monotonic() + limits.pattern_seconds
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def add(self, name: str, key: str) -> None:
        """Compile a key of the field `name`. Raises AdapterConfigError."""
        self._compiled[key] = _compile(name, key)

    def first(self, keys: Iterable[str], path: str) -> str | None:
        """The first of `keys`, all of which were added, that matches. Raises LimitError when it takes too long."""
        return next((key for key in keys if self._matches(key, path)), None)

    def _matches(self, key: str, path: str) -> bool:
        left = self._deadline - time.monotonic()
        try:
            if left > 0:
                return self._compiled[key].match(path, timeout=left) is not None
        except TimeoutError:
            pass
        raise LimitError(f"pattern {key!r}", got="a match that takes too long", fix="write the modules' names out")


@dataclass(frozen=True)
class PerModule(Generic[_Number]):
    """A number for every module: that of the first pattern which matches its path, else the default."""

    name: str
    default: _Number
    pattern: Mapping[str, _Number]
    matcher: PatternMatcher

    def of(self, path: str) -> _Number:
        """The number for the module at `path`. Raises LimitError for a pattern that takes too long."""
        key = self.matcher.first(self.pattern, path)
        return self.default if key is None else self.pattern[key]


def _compile(name: str, key: str) -> regex.Pattern[str]:
    # Counted repeats ({1000}, nested) can make compiling take for ever, and names of modules need none.
    fault = None
    if len(key) > _LONGEST_PATTERN or "{" in key or "(?" in key:
        fault = f"at most {_LONGEST_PATTERN} characters, without '{{' and '(?'"
    else:
        try:
            return regex.compile(rf"(.*\.)?({key})$")
        except (regex.error, RecursionError) as error:
            fault = f"a regular expression ({error})"
    raise AdapterConfigError(name, got=f"the key {key!r}", expected=fault, fix="write the modules' names out")


def _finite(name: str, value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _wrong(name, value, "a finite number")
    return number


def _wrong(name: str, got: object, expected: object) -> HydraServeError:
    return AdapterConfigError(name, got=f"{got!r}", expected=expected, fix="correct adapter_config.json")
