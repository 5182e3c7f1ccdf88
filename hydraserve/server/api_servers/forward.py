"""HTTP requests that a front hands on to the keeper: those about adapters, and those about the whole server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hydraserve.errors import BusyError
from hydraserve.server.api_servers.link import CLIENT_HEADER
from hydraserve.server.errors import error_response

if TYPE_CHECKING:
    from hydraserve.server.api_servers.front import Front

_PATHS = ("/v1/adapters", "/v1/models", "/v1/routing", "/metrics")
_EXACT = ("/ready", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
# Of one connection, not of the message (RFC 9110, section 7.6.1).
_HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect"}
)


class ForwardMiddleware:
    """ASGI middleware: on a front, what only the keeper can answer goes there, as it is; keys and limits are checked
    there. front: None in the keeper, and with one API server process."""

    def __init__(self, app: ASGIApp, front: Callable[[], Front | None]) -> None:
        self._app, self._front = app, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        front = self._front()
        if front is not None and scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path in _EXACT or any(path == p or path.startswith(f"{p}/") for p in _PATHS):
                await front.forwarder.forward(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Forwarder:
    """Hands requests on to the server that listens on a Unix socket."""

    def __init__(self, socket: Path) -> None:
        transport = httpx.AsyncHTTPTransport(uds=str(socket), limits=httpx.Limits(max_connections=None))
        self._client = httpx.AsyncClient(transport=transport, base_url="http://keeper", timeout=None)

    async def close(self) -> None:
        await self._client.aclose()

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with what the keeper says; stop asking when the client goes away."""
        whole = asyncio.Event()
        asking = asyncio.create_task(self._ask(scope, _body(receive, whole), whole, send))
        leaving = asyncio.create_task(_client_leaves(receive, whole))
        try:
            await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                await asking
        finally:
            leaving.cancel()
            asking.cancel()
            await asyncio.gather(asking, leaving, return_exceptions=True)

    async def _ask(self, scope: Scope, body: AsyncIterator[bytes], whole: asyncio.Event, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name not in _HOP_BY_HOP | {CLIENT_HEADER}]
        client = scope.get("client")
        headers.append((CLIENT_HEADER, (client[0] if client else "").encode()))
        target = scope.get("raw_path", scope["path"].encode()) + (b"?" + scope["query_string"]).rstrip(b"?")
        url = self._client.base_url.copy_with(raw_path=target)
        has_body = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
        if not has_body:
            async for _ in body:
                pass
        begun = False

        async def pass_on(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        request = self._client.build_request(scope["method"], url, headers=headers, content=body if has_body else None)
        try:
            answer = await self._client.send(request, stream=True)
            try:
                raw = [(name.lower(), value) for name, value in answer.headers.raw if name.lower() not in _HOP_BY_HOP]
                await pass_on({"type": "http.response.start", "status": answer.status_code, "headers": raw})
                async for chunk in answer.aiter_raw():
                    await pass_on({"type": "http.response.body", "body": chunk, "more_body": True})
                await pass_on({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                await answer.aclose()
        except httpx.TransportError as error:
            if begun:  # the client sees that the answer was cut
                raise
            failed = BusyError(
                what="API server process that keeps the adapters",
                got=str(error) or type(error).__name__,
                expected="an answer",
                fix="try again",
            )
            await error_response(failed, HTTPStatus.SERVICE_UNAVAILABLE)(scope, _nothing, send)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def _body(receive: Receive, whole: asyncio.Event) -> AsyncIterator[bytes]:
    """The request's body. Its end, or the client's, sets `whole`."""
    more = True
    while more:
        message = await receive()
        more = message["type"] == "http.request" and message.get("more_body", False)
        yield message.get("body", b"")
    whole.set()


async def _client_leaves(receive: Receive, whole: asyncio.Event) -> None:
    await whole.wait()
    while (await receive())["type"] != "http.disconnect":
        pass
