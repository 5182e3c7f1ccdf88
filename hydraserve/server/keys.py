"""API keys: whose they are, what each of them allows, how often."""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import secrets
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from hydraserve.errors import ConfigError, RateLimitError, UnauthenticatedError

logger = logging.getLogger("hydraserve.server")

# Seconds between two looks at the key file: a key that is taken out stops working about this soon.
_RELOAD_S = 1.0


class Role(StrEnum):
    """What a key is for. An admin key may do everything; a metrics key may read /metrics."""

    INFERENCE = "inference"
    ADMIN = "admin"
    METRICS = "metrics"


@dataclass(frozen=True)
class Principal:
    """Whoever sends a request.

    name:     of the key, for logs; never the key.
    adapters: patterns (as in shell globs) of the adapters it may see and use.
    isolated: whether its prefix cache is its own.
    rate:     requests a minute; None: no limit.
    """

    name: str
    role: Role = Role.INFERENCE
    adapters: tuple[str, ...] = ("*",)
    isolated: bool = False
    rate: float | None = None

    def may_use(self, adapter: str) -> bool:
        """A derived adapter (NAME@top_k=1) may be used by whoever may use what it is made from."""
        name = adapter.partition("@")[0]
        return self.role is Role.ADMIN or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.adapters)


ANONYMOUS = Principal("anonymous")


def hash_key(key: str) -> str:
    """SHA-256 in hexadecimal. Keys are long random strings, so that nothing slower is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """The keys of a server: those of the command line, and those of a key file, which is read again when it changes.

    inference: vLLM's --api-key; each may use every adapter.
    admin:     the --admin-api-key.
    file:      TOML, see `parse_key_file`.

    Raises ConfigError for a key file that cannot be used.
    """

    def __init__(
        self,
        inference: Iterable[str] = (),
        admin: str | None = None,
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._given = {hash_key(key): Principal(f"api-key-{i}") for i, key in enumerate(inference)}
        if admin is not None:
            self._given[hash_key(admin)] = Principal("admin", Role.ADMIN)
        self._file, self._clock = file, clock
        self._from_file: Mapping[str, Principal] = {}
        self._stamp: tuple[int, int] | None = None
        self._looked = clock()
        if file is not None:
            self._from_file, self._stamp = _read(file), _stamp(file)
        self._limits: dict[str, RateLimit] = {}

    @property
    def has_inference_keys(self) -> bool:
        """Whether a request without a key is refused."""
        return self._file is not None or any(p.role is Role.INFERENCE for p in self._given.values())

    @property
    def has_keys(self) -> bool:
        return bool(self._principals())

    @property
    def has_admin_key(self) -> bool:
        return any(p.role is Role.ADMIN for p in self._principals().values())

    @property
    def has_tenants(self) -> bool:
        """Whether some keys may not see all adapters: then nothing may tell their names to everybody."""
        return self._file is not None

    def identify(self, authorization: str | None) -> Principal | None:
        """Whose key an Authorization header holds; None without one.

        Raises UnauthenticatedError for a key that is not known. All known keys are compared, each in constant time.
        """
        if not authorization:
            return None
        scheme, _, key = authorization.partition(" ")
        presented, found = hash_key(key.strip()), None
        for digest, principal in self._principals().items():
            if secrets.compare_digest(digest, presented):
                found = principal
        if found is None or scheme.lower() != "bearer":
            raise UnauthenticatedError(
                what="Authorization", got="a key that is not known", expected="Bearer KEY", fix="check the key"
            )
        return found

    def count(self, principal: Principal) -> None:
        """Count one request. Raises RateLimitError when that is one too many."""
        if principal.rate is None:
            return
        limit = self._limits.get(principal.name)
        if limit is None or limit.per_minute != principal.rate:
            limit = self._limits[principal.name] = RateLimit(principal.rate, self._clock)
        wait = limit.take()
        if wait > 0:
            error = RateLimitError(
                what=f"requests with the key {principal.name!r}",
                got="one more",
                expected=f"at most {principal.rate:g} a minute",
                fix=f"try again in {wait:.1f} s",
            )
            error.retry_after = wait
            raise error

    def _principals(self) -> dict[str, Principal]:
        if self._file is not None and self._clock() - self._looked >= _RELOAD_S:
            self._looked = self._clock()
            stamp = _stamp(self._file)
            if stamp is not None and stamp != self._stamp:
                try:
                    self._from_file, self._stamp = _read(self._file), stamp
                except ConfigError as error:
                    # Half-written, or wrong: what was valid goes on until it is valid again.
                    self._stamp = stamp
                    logger.error("%s", error)
        return {**self._from_file, **self._given}


class RateLimit:
    """A bucket that fills evenly with `per_minute` requests a minute, and holds those of ten seconds (at least one)."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._size = max(1.0, per_minute / 6)
        self._level, self._filled = self._size, clock()

    def take(self) -> float:
        """Take one request out; 0.0, or the seconds until there will be one."""
        now = self._clock()
        per_second = self.per_minute / 60
        self._level = min(self._size, self._level + (now - self._filled) * per_second)
        self._filled = now
        if self._level >= 1:
            self._level -= 1
            return 0.0
        return (1 - self._level) / per_second


def parse_key_file(text: str) -> dict[str, Principal]:
    """Hash -> principal of a key file:

        [[key]]
        name = "team-a"
        sha256 = "..."                     # of the key; `hydraserve adapters new-key` makes both
        role = "inference"                 # or "admin", "metrics"
        adapters = ["sql", "team-a-*"]     # what it may see and use; default: none
        isolated = true                    # a prefix cache of its own; default: false
        requests_per_minute = 600          # default: no limit

    Without any key it holds the line `key = []`: an empty file may be one that is just being written.

    Raises ConfigError.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _bad("key file", error, "TOML") from error
    entries = content.get("key")
    if not isinstance(entries, list) or set(content) != {"key"} or not all(isinstance(e, dict) for e in entries):
        raise _bad("key file", f"the fields {sorted(content)}", "[[key]] tables only, or key = [] for none")
    principals: dict[str, Principal] = {}
    for entry in entries:
        digest, principal = _parse_key(entry)
        if digest in principals or principal.name in {p.name for p in principals.values()}:
            raise _bad(f"key {principal.name!r}", "the same name or sha256 twice", "each once")
        principals[digest] = principal
    return principals


def _parse_key(entry: Mapping[str, Any]) -> tuple[str, Principal]:
    kinds = {"name": str, "sha256": str, "role": str, "adapters": list, "isolated": bool, "requests_per_minute": int}
    name = entry.get("name", "without a name")
    for field_name, value in entry.items():
        if field_name not in kinds or type(value) is not kinds[field_name]:
            raise _bad(f"key {name!r}", f"{field_name} = {value!r}", f"the fields {', '.join(kinds)}, each of its type")
    digest = str(entry.get("sha256", "")).lower()
    if "name" not in entry or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise _bad(f"key {name!r}", f"sha256 = {digest!r}", "a name, and the 64 digits of the key's SHA-256")
    if entry.get("role", "inference") not in list(Role):
        raise _bad(f"key {name!r}", f"role = {entry['role']!r}", f"one of {', '.join(Role)}")
    rate = entry.get("requests_per_minute")
    if rate is not None and rate < 1:
        raise _bad(f"key {name!r}", f"requests_per_minute = {rate}", "at least 1")
    return digest, Principal(
        name=str(name),
        role=Role(entry.get("role", "inference")),
        adapters=tuple(str(pattern) for pattern in entry.get("adapters", [])),
        isolated=entry.get("isolated", False),
        rate=rate,
    )


def _read(path: Path) -> dict[str, Principal]:
    try:
        return parse_key_file(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(f"key file {path}", error, "a readable file") from error


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _bad(what: str, got: object, expected: str) -> ConfigError:
    return ConfigError(what=what, got=got, expected=expected, fix="correct the file of --api-key-file")
