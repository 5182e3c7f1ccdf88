"""Which HTTP status an error becomes, and how it is written. The one place that decides."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from hydraserve.errors import (
    AdapterConfigError,
    AdapterConflictError,
    AdapterError,
    AdapterNotFoundError,
    BodyTooLargeError,
    BusyError,
    ConfigError,
    ForbiddenError,
    HydraServeError,
    InvalidRequestError,
    LimitError,
    RateLimitError,
    SlowRequestError,
    SourceError,
    SourceForbiddenError,
    StorageError,
    UnauthenticatedError,
    UnknownAdapterError,
)

# The first that an error is an instance of. 4xx: whoever asked can do something about it.
_STATUS: tuple[tuple[type[HydraServeError], HTTPStatus], ...] = (
    (UnauthenticatedError, HTTPStatus.UNAUTHORIZED),
    (ForbiddenError, HTTPStatus.FORBIDDEN),
    (SourceForbiddenError, HTTPStatus.FORBIDDEN),
    (RateLimitError, HTTPStatus.TOO_MANY_REQUESTS),
    (BodyTooLargeError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (SlowRequestError, HTTPStatus.REQUEST_TIMEOUT),
    (InvalidRequestError, HTTPStatus.BAD_REQUEST),
    (BusyError, HTTPStatus.SERVICE_UNAVAILABLE),
    (UnknownAdapterError, HTTPStatus.NOT_FOUND),
    (AdapterNotFoundError, HTTPStatus.NOT_FOUND),
    (AdapterConflictError, HTTPStatus.CONFLICT),
    (SourceError, HTTPStatus.BAD_GATEWAY),
    (LimitError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (StorageError, HTTPStatus.INSUFFICIENT_STORAGE),
    (AdapterConfigError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (AdapterError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (ConfigError, HTTPStatus.BAD_REQUEST),
    (HydraServeError, HTTPStatus.INTERNAL_SERVER_ERROR),
)

# What OpenAI's clients know these by; others are called by their phrase.
_TYPES = {
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.CONFLICT: "ConflictError",
    HTTPStatus.UNPROCESSABLE_ENTITY: "UnprocessableEntityError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "UnprocessableEntityError",
    HTTPStatus.REQUEST_TIMEOUT: "BadRequestError",
    HTTPStatus.TOO_MANY_REQUESTS: "RateLimitError",
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerError",
    HTTPStatus.BAD_GATEWAY: "InternalServerError",
    HTTPStatus.INSUFFICIENT_STORAGE: "InternalServerError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
}


def status_of(error: HydraServeError) -> HTTPStatus:
    """The status that an answer with this error has."""
    return next(status for kind, status in _STATUS if isinstance(error, kind))


def error_body(error: HydraServeError, status: HTTPStatus) -> dict[str, Any]:
    """{"error": {...}} as OpenAI's API writes it, with the class of ours as `reason`."""
    return {
        "error": {
            "message": str(error),
            "type": _TYPES[status],
            "param": None,
            "code": status.value,
            "reason": type(error).__name__,
        }
    }


def error_response(error: HydraServeError, status: HTTPStatus | None = None) -> JSONResponse:
    """The whole answer. status: instead of `status_of`."""
    status, headers = status or status_of(error), {}
    if isinstance(error, RateLimitError | BusyError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, UnauthenticatedError):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error, status), status_code=status.value, headers=headers)


async def handle_error(_request: Request, error: Exception) -> JSONResponse:
    """Exception handler for HydraServeError."""
    assert isinstance(error, HydraServeError)
    return error_response(error)
