"""Every error that HydraServe raises on purpose.

    HydraServeError
    ├── ConfigError                    a command line or configuration that cannot be used
    ├── PortInUseError                 the address to listen on is taken
    ├── ModelError                     the base model
    │   ├── ModelNotFoundError
    │   └── ModelTooLargeError         does not fit the machine
    ├── EngineError                    vLLM
    │   ├── VersionError               a version that the integration was not checked against
    │   └── MissingSymbolError         something we extend is no longer where it was
    ├── RequestError                   what a client of the running server asked for
    │   ├── UnauthenticatedError       no key, or one that is not known
    │   ├── ForbiddenError             a known key that may not do this
    │   ├── RateLimitError             too many requests with this key
    │   ├── InvalidRequestError        what was asked cannot be answered, or is too large
    │   │   ├── BodyTooLargeError      more bytes than the server reads of one request
    │   │   └── SlowRequestError       the rest of a request did not come
    │   ├── BusyError                  it can be answered, but not now
    │   ├── UnknownAdapterError        no adapter of this name is served
    │   ├── AdapterConflictError       the name or the place that was asked for is taken
    │   ├── SourceForbiddenError       a source outside what the operator allowed
    │   └── SourceError                a source that could not be fetched
    └── AdapterError                   an adapter that cannot be loaded, served or written
        ├── AdapterNotFoundError       nothing there, or a file of it is missing
        │   └── AmbiguousAdapterError  several adapters below one folder
        ├── UnreadableFileError        no permission, not a regular file, cut short, damaged
        │   └── StorageError           this server's own disk cannot be written
        ├── UnsafeFileError            reading it could run code or exhaust memory
        ├── AdapterFormatError         no format, or more than one, recognises the folder
        ├── AdapterConfigError         adapter_config.json: not JSON, a missing field, a wrong value
        ├── MissingTensorError
        ├── UnexpectedTensorError
        ├── DuplicateModuleError       two sets of tensors for one module
        ├── ShapeError                 tensors that disagree with one another or with the config
        │   └── EmptyTensorError       shape (0,): parameters that were never gathered
        ├── DtypeError                 not a floating-point type that can be served
        ├── NonFiniteError             a NaN or an infinity among the weights
        ├── UnsupportedFeatureError    understood, but it cannot be served (or written) exactly
        ├── LimitError                 larger than the server is willing to load
        └── BaseMismatchError          an adapter for another base model: no such module
            └── BaseShapeError         such a module exists, of another size; also a ShapeError

Which HTTP status or exit code an error becomes is decided by the server and the command line, not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class HydraServeError(Exception):
    """The root: what is wrong, what was found, what would be right, and what to do about it.

    what:     the subject: a field, a file, a tensor, a setting.
    got:      what was found there.
    expected: what should have been there.
    fix:      what the reader can do.
    where:    set later by whoever knows it: the adapter or file that `what` belongs to.

    `str(error)` is one line of text. Errors survive pickling, because they cross process boundaries;
    subclasses therefore keep this constructor.
    """

    def __init__(
        self, what: str, got: object = None, expected: object = None, fix: str | None = None, where: str | None = None
    ) -> None:
        super().__init__(what, got, expected, fix, where)
        self.what = what
        self.got = None if got is None else str(got)
        self.expected = None if expected is None else str(expected)
        self.fix = fix
        self.where = where

    def __reduce__(self) -> tuple[type[HydraServeError], tuple[str | None, ...]]:
        return type(self), (self.what, self.got, self.expected, self.fix, self.where)

    def __str__(self) -> str:
        found = [
            f"{label} {_one_line(text)}"
            for label, text in (("got", self.got), ("expected", self.expected))
            if text is not None
        ]
        line = ": ".join(_one_line(part) for part in (self.where, self.what, ", ".join(found)) if part)
        return f"{line}. To fix: {_one_line(self.fix)}" if self.fix else line


def pack(error: HydraServeError) -> dict[str, Any]:
    """The error as plain data, for another process."""
    kind, parts = error.__reduce__()
    return {"kind": kind.__name__, "parts": list(parts), "retry_after": getattr(error, "retry_after", None)}


def unpack(packed: Mapping[str, Any]) -> HydraServeError:
    """The error that `pack` was given; an EngineError for a kind that is not known here."""
    kind: type[HydraServeError] = globals().get(packed["kind"], EngineError)
    error = kind(*packed["parts"])
    if packed["retry_after"] is not None:
        error.retry_after = packed["retry_after"]  # type: ignore[attr-defined]
    return error


# What errors quote comes from files and requests: no control characters, and no longer than a person reads.
_LONGEST_PART = 600


def _one_line(text: str) -> str:
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: _LONGEST_PART + 1])
    return printable if len(printable) <= _LONGEST_PART else printable[: _LONGEST_PART - 3] + "..."


class ConfigError(HydraServeError):
    """A command line or configuration that cannot be used."""


class PortInUseError(HydraServeError):
    """The address to listen on is taken."""


class ModelError(HydraServeError):
    """The base model cannot be served."""


class ModelNotFoundError(ModelError):
    """No base model of this name or at this path."""


class ModelTooLargeError(ModelError):
    """The base model does not fit the machine."""


class EngineError(HydraServeError):
    """vLLM cannot be used as it is installed or configured."""


class VersionError(EngineError):
    """A version of vLLM that the integration was not checked against."""


class MissingSymbolError(EngineError):
    """Something of vLLM's that we extend is no longer where it was."""


class RequestError(HydraServeError):
    """Something that a client of the running server asked for and does not get."""


class UnauthenticatedError(RequestError):
    """No key, or one that is not known."""


class ForbiddenError(RequestError):
    """A known key, or a keyless client, that may not do this."""


class RateLimitError(RequestError):
    """Too many requests with this key. retry_after: seconds until the next one is taken."""

    retry_after: float = 1.0


class InvalidRequestError(RequestError):
    """A request whose parts are wrong, do not go together, or ask for too much."""


class BodyTooLargeError(InvalidRequestError):
    """A request body of more bytes than the server reads."""


class SlowRequestError(InvalidRequestError):
    """A request whose body stopped coming."""


class BusyError(RequestError):
    """As much of this as the server does at a time is under way already. retry_after: seconds until it may not be."""

    retry_after: float = 1.0


class UnknownAdapterError(RequestError):
    """No adapter of this name is served (or none that this key may see)."""


class AdapterConflictError(RequestError):
    """The adapter's name, or the last place that pinned adapters may take, is taken."""


class SourceForbiddenError(RequestError):
    """A source of adapters outside what the operator allowed."""


class SourceError(RequestError):
    """A source that could not be fetched: unreachable, or it sent something else than it announced."""


class AdapterError(HydraServeError):
    """An adapter that cannot be loaded, served or written."""


class AdapterNotFoundError(AdapterError):
    """No adapter at this path, or one of its files is missing."""


class AmbiguousAdapterError(AdapterNotFoundError):
    """Several adapters below one folder, none of which is the obvious one."""


class UnreadableFileError(AdapterError):
    """A file without permission, not a regular one, cut short or damaged."""


class StorageError(UnreadableFileError):
    """This server's own disk is full, or cannot be written."""


class UnsafeFileError(AdapterError):
    """A file that would run code or exhaust memory when read. It was not read."""


class AdapterFormatError(AdapterError):
    """No format, or more than one, recognises the folder."""


class AdapterConfigError(AdapterError):
    """adapter_config.json is not a JSON object, lacks a field or holds a wrong value."""


class MissingTensorError(AdapterError):
    """A tensor that the module's other tensors call for is not in the file."""


class UnexpectedTensorError(AdapterError):
    """A tensor that the format does not know."""


class DuplicateModuleError(AdapterError):
    """Two sets of tensors for one module."""


class ShapeError(AdapterError):
    """Tensors whose shapes disagree with one another or with the config."""


class EmptyTensorError(ShapeError):
    """A tensor of shape (0,): parameters saved without gathering them from all ranks."""


class DtypeError(AdapterError):
    """A tensor that is not of a floating-point type which can be served."""


class NonFiniteError(AdapterError):
    """A NaN or an infinity among the weights."""


class UnsupportedFeatureError(AdapterError):
    """A feature that is understood, but cannot be served (or written) exactly."""


class LimitError(AdapterError):
    """An adapter larger than the server is willing to load."""


class BaseMismatchError(AdapterError):
    """An adapter for another base model."""


class BaseShapeError(BaseMismatchError, ShapeError):
    """A module that the base model has, but of another size."""
