"""What a request may be before anything looks at it: taken at all, of a size, and of a shape that can be parsed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hydraserve.errors import BodyTooLargeError, BusyError, RequestError, SlowRequestError
from hydraserve.server.errors import error_response
from hydraserve.server.json_limits import check_json, check_other
from hydraserve.server.security import is_administration, is_inference
from hydraserve.server.traffic import Traffic

# Without another byte of the body.
BODY_PAUSE_S = 30.0
# The pace that a whole body has to keep on average: 1 Mbit/s.
SLOWEST_BYTES_S = 1 << 17
# What all bodies together may take, as a multiple of what one may be; half a GiB by default.
BODIES_AT_ONCE = 32
# Of each body so many bytes do not count, so that senders of large ones cannot crowd out everybody else.
UNCOUNTED = 1 << 16
# Larger bodies are checked in a thread: the event loop goes on meanwhile.
_CHECKED_AT_ONCE = 1 << 19


class Bodies:
    """Bytes of request bodies that are held, from when they come until their request is answered.

    limit: of all together, without the first UNCOUNTED of each.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    @contextmanager
    def body(self) -> Iterator[Body]:
        """One body, for as long as its request lasts."""
        body = Body(self)
        try:
            yield body
        finally:
            self.held -= body.counted


class Body:
    """size: bytes that have come; counted: those of them that count."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies, self.size, self.counted = bodies, 0, 0

    def grow(self, size: int) -> None:
        """Count `size` more bytes. Raises BusyError when all bodies together are too many."""
        self.size += size
        more = max(0, self.size - UNCOUNTED) - self.counted
        if self._bodies.held + more > self._bodies.limit:
            raise BusyError(
                what="bodies of all requests",
                got=f"{self._bodies.held:,} bytes, and another one of {self.size:,} or more",
                expected=f"at most {self._bodies.limit:,}",
                fix="try again later or elsewhere, or send less",
            )
        self.counted += more
        self._bodies.held += more


class LimitMiddleware:
    """ASGI middleware: reads a request's body within limits, counts the request, and hands both on.

    A request counts only when its body is there, so clients that send half of one take no place in the queue.
    """

    def __init__(self, app: ASGIApp, traffic: Traffic, max_body: int, body_pause_s: float = BODY_PAUSE_S) -> None:
        self._app, self._traffic = app, traffic
        self._max_body, self._body_pause_s = max_body, body_pause_s
        self._body_s = body_pause_s + max_body / SLOWEST_BYTES_S
        self.bodies = Bodies(BODIES_AT_ONCE * max_body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            with self.bodies.body() as held:
                await self._answer(held, scope, receive, send)
        except RequestError as error:
            response = error_response(error)
            response.headers["Connection"] = "close"  # what else the client sends of this request is not read
            await response(scope, receive, send)

    async def _answer(self, held: Body, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        counts = is_inference(path) or is_administration(scope["method"], path)
        if counts:
            self._traffic.refuse()
        headers = Headers(scope=scope)
        body = await self._read(held, headers, receive)
        if body is None:  # the client has gone
            return
        await check(headers, body)
        if not counts:
            await self._app(scope, _replay(body, receive), send)
            return
        with self._traffic.request():
            await self._app(scope, _replay(body, receive), _with_retry_after(send))

    async def _read(self, held: Body, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None when the client goes away. Raises BodyTooLargeError, SlowRequestError or BusyError."""
        announced = headers.get("content-length", "")
        if announced.isdecimal():
            self._check_size(int(announced))
        begun, pieces, more = time.monotonic(), list[bytes](), True
        while more:
            message = await self._next(receive, begun + self._body_s - time.monotonic(), held.size)
            if message["type"] == "http.disconnect":
                return None
            piece, more = message.get("body", b""), message.get("more_body", False)
            self._check_size(held.size + len(piece))
            held.grow(len(piece))
            pieces.append(piece)
        return b"".join(pieces)

    async def _next(self, receive: Receive, left_s: float, size: int) -> Message:
        """The next piece of a body of which `size` bytes are there. Raises SlowRequestError."""
        if left_s > 0:
            with suppress(TimeoutError):
                return await asyncio.wait_for(receive(), min(self._body_pause_s, left_s))
        got = f"nothing more for {self._body_pause_s:.0f} s"
        if left_s < self._body_pause_s:
            got = f"{size:,} bytes of it in {self._body_s:.0f} s"
        raise SlowRequestError("body", got=got, expected="all of it")

    def _check_size(self, size: int) -> None:
        if size > self._max_body:
            raise BodyTooLargeError(
                what="body",
                got=f"{size:,} bytes or more",
                expected=f"at most {self._max_body:,}",
                fix="send less, or start the server with more --max-body-mib",
            )


async def check(headers: Headers, body: bytes) -> None:
    """Raises InvalidRequestError for a body that no parser should see."""
    kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    checks = check_json if kind == "application/json" or kind.endswith("+json") else check_other
    if len(body) > _CHECKED_AT_ONCE:
        await asyncio.to_thread(checks, body)
    else:
        checks(body)


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
