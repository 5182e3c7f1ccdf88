"""What a request may be before anything looks at it: taken at all, of a size, and of a shape that can be parsed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hydraserve.errors import BodyTooLargeError, InvalidRequestError, RequestError, SlowRequestError
from hydraserve.server.errors import error_response
from hydraserve.server.security import is_administration, is_inference
from hydraserve.server.traffic import Traffic

# Schemas of tools and answers rarely reach 30; what parses JSON recursively gives up, or crashes, at some thousands.
MAX_NESTING = 100
# Without another byte of the body.
BODY_PAUSE_S = 30.0

_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]+|\\.)*"?|[\[{]|[\]}]', re.DOTALL)


class LimitMiddleware:
    """ASGI middleware: reads a request's body within limits, counts the request, and hands both on.

    A request counts only when its body is there, so clients that send half of one take no place in the queue.
    """

    def __init__(self, app: ASGIApp, traffic: Traffic, max_body: int, body_pause_s: float = BODY_PAUSE_S) -> None:
        self._app, self._traffic = app, traffic
        self._max_body, self._body_pause_s = max_body, body_pause_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        counts = is_inference(path) or is_administration(scope["method"], path)
        try:
            if counts:
                self._traffic.refuse()
            body = await self._read(Headers(scope=scope), receive)
            if body is None:  # the client has gone
                return
            check_text(Headers(scope=scope), body)
            check_nesting(body)
            check_integers(body)
            if not counts:
                await self._app(scope, _replay(body, receive), send)
                return
            with self._traffic.request():
                await self._app(scope, _replay(body, receive), _with_retry_after(send))
        except RequestError as error:
            response = error_response(error)
            response.headers["Connection"] = "close"  # what else the client sends of this request is not read
            await response(scope, receive, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None when the client goes away. Raises BodyTooLargeError or SlowRequestError."""
        announced = headers.get("content-length", "")
        if announced.isdecimal():
            self._check_size(int(announced))
        pieces: list[bytes] = []
        size, more = 0, True
        while more:
            try:
                message = await asyncio.wait_for(receive(), self._body_pause_s)
            except TimeoutError:
                raise SlowRequestError(
                    "body", got=f"nothing more for {self._body_pause_s:.0f} s", expected="all of it"
                ) from None
            if message["type"] == "http.disconnect":
                return None
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            self._check_size(size)
            pieces.append(piece)
        return b"".join(pieces)

    def _check_size(self, size: int) -> None:
        if size > self._max_body:
            raise BodyTooLargeError(
                what="body",
                got=f"{size:,} bytes or more",
                expected=f"at most {self._max_body:,}",
                fix="send less, or start the server with more --max-body-mib",
            )


def check_text(headers: Headers, body: bytes) -> None:
    """Raises InvalidRequestError for JSON that is not UTF-8; Python's parser would guess other encodings."""
    if not headers.get("content-type", "application/json").startswith("application/json"):
        return
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            "body", got=f"byte {body[error.start]:#04x} at {error.start}", expected="JSON in UTF-8", fix="encode it so"
        ) from None


def check_nesting(body: bytes) -> None:
    """Raises InvalidRequestError for JSON that is nested too deeply. What else may be wrong is left to the parser."""
    if body.count(b"[") + body.count(b"{") <= MAX_NESTING:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(body):
        first = body[match.start()]
        depth += (first in b"[{") - (first in b"]}")
        if depth > MAX_NESTING:
            raise InvalidRequestError(
                "body", got=f"JSON of more than {MAX_NESTING} levels", expected="fewer", fix="send flatter JSON"
            )


def check_integers(body: bytes) -> None:
    """Raises InvalidRequestError for integers of more than 64 bits, which what the engine is sent cannot hold."""
    if _LONG_NUMBER.search(body) is not None:
        with contextlib.suppress(ValueError):  # no JSON
            json.loads(body, parse_int=_parse_integer)


def _parse_integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise InvalidRequestError(
            "body", got=f"the number {text[:30]}...", expected="integers of 64 bits", fix="send smaller ones"
        )
    return int(text)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` as if the body had not been read yet."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def _with_retry_after(send: Send) -> Send:
    """`send`, with the header that tells clients to try again on every 503; vLLM's own have none."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 503:
            MutableHeaders(scope=message).setdefault("retry-after", "1")
        await send(message)

    return sent
