"""Around every request: who sends it, may they, and which adapter it was answered with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hydraserve.errors import RequestError
from hydraserve.server.errors import error_response
from hydraserve.server.keys import Principal, Role
from hydraserve.server.lifecycle.served import RequestScope, current_scope
from hydraserve.server.security import Caller, Gate, is_counted

ADAPTER_HEADER = "x-hydraserve-adapter"
_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


class RequestMiddleware:
    """ASGI middleware. Sets `current_scope` for each request and ends it with the response.

    count: counts one request of a principal that has a limit; raises RateLimitError.
    """

    def __init__(self, app: ASGIApp, gate: Gate, count: Callable[[Principal], Awaitable[None]]) -> None:
        self._app, self._gate, self._count = app, gate, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        method = scope.get("method", "WEBSOCKET")
        try:
            principal = self._gate.admit(method, path, headers.get("authorization"), caller_of(scope, headers))
            if principal.rate is not None and is_counted(method, path):
                await self._count(principal)
        except RequestError as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": "not allowed"})
            else:
                await error_response(error)(scope, receive, send)
            return
        # Without tenants, whoever may send requests may know all that there is to know.
        request = RequestScope(principal, told_all=principal.role is Role.ADMIN or not self._gate.keys.has_tenants)

        async def send_with_adapter(message: Message) -> None:
            if message["type"] == "http.response.start" and request.adapter is not None:
                MutableHeaders(scope=message)[ADAPTER_HEADER] = request.adapter.version
            await send(message)

        token = current_scope.set(request)
        try:
            await self._app(scope, receive, send_with_adapter)
        finally:
            current_scope.reset(token)
            request.end()


def caller_of(scope: Scope, headers: Headers) -> Caller:
    """What is known of the sender besides its key."""
    client = scope.get("client")
    return Caller(
        address=client[0] if client else "",
        host=headers.get("host", ""),
        origin=headers.get("origin"),
        proxied=any(name in headers for name in _PROXY_HEADERS),
    )
