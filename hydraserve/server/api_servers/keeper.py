"""The API server process that keeps the adapters, as far as the other ones ask it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from hydraserve import errors
from hydraserve.adapters.runtime import RequestHooks
from hydraserve.errors import EngineError, HydraServeError
from hydraserve.server.api_servers.link import CLIENT_HEADER, HTTP_SOCKET, LONGEST_MESSAGE, SOCKET, messages, write
from hydraserve.server.keys import KeyRing, Principal
from hydraserve.server.lifecycle.served import ServedAdapter

logger = logging.getLogger("hydraserve.server")

# Request ids that are told to the fronts in one message.
_IDS_PER_MESSAGE = 1000


class Keeper:
    """Answers the fronts.

    folder: where the sockets are made; only this user may open it.
    app:    the whole HTTP application, for the requests that the fronts hand on.
    find:   name -> what it is served with at this moment, or None.
    note:   told the name of each adapter that a front's request uses.
    """

    def __init__(
        self,
        folder: Path,
        app: ASGIApp,
        keys: KeyRing,
        find: Callable[[str], ServedAdapter | None],
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.hooks: RequestHooks | None = None
        self.keys, self.find, self.note = keys, find, note
        self._folder, self._app = folder, app
        self._fronts: dict[_Front, asyncio.StreamWriter] = {}
        self._arrived = asyncio.Condition()
        self._none_left = threading.Event()
        self._none_left.set()
        self._links: asyncio.Server | None = None
        self._http: _QuietServer | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, hooks: RequestHooks, fronts: int, timeout_s: float) -> None:
        """Answer from now on; returns when so many fronts are there. Raises EngineError when they do not come."""
        self.hooks = hooks
        self._links = await asyncio.start_unix_server(self._serve, self._folder / SOCKET, limit=LONGEST_MESSAGE)
        config = uvicorn.Config(
            _FromFronts(self._app),
            uds=str(self._folder / HTTP_SOCKET),
            lifespan="off",
            log_config=None,
            # What the front's own server does already.
            proxy_headers=False,
            server_header=False,
            date_header=False,
        )
        self._http = _QuietServer(config)
        self._serving = asyncio.create_task(self._http.serve())
        try:
            async with asyncio.timeout(timeout_s), self._arrived:
                await self._arrived.wait_for(lambda: len(self._fronts) == fronts)
        except TimeoutError:
            raise EngineError(
                what="API server processes",
                got=f"{len(self._fronts)} of {fronts} after {timeout_s:.0f} s",
                expected="all of them",
                fix="see the log above",
            ) from None

    def abort(self, request_ids: Iterable[str]) -> None:
        """Have the fronts end these requests, as far as they are theirs."""
        ids = list(request_ids)
        for front in self._fronts:
            for start in range(0, len(ids), _IDS_PER_MESSAGE):
                front.push(ids[start : start + _IDS_PER_MESSAGE])

    def wait_for_fronts(self, timeout_s: float) -> bool:
        """Wait until all of them have ended; for another thread than the event loop's."""
        return self._none_left.wait(timeout_s)

    async def close(self) -> None:
        """Answer no longer."""
        if self._links is not None:
            self._links.close()
            for writer in self._fronts.values():
                writer.close()
        if self._http is not None and self._serving is not None:
            self._http.should_exit = True
            self._http.force_exit = True
            await self._serving

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        front = _Front(self, writer)
        self._none_left.clear()
        self._fronts[front] = writer
        async with self._arrived:
            self._arrived.notify_all()
        try:
            async for number, method, *arguments in messages(reader):
                front.handle(number, method, arguments)
        finally:
            del self._fronts[front]
            await front.end_all()
            writer.close()
            if not self._fronts:
                self._none_left.set()


class _Front:
    """What one front uses. A use has a number that the front has chosen, and lasts until the front says its end."""

    def __init__(self, keeper: Keeper, writer: asyncio.StreamWriter) -> None:
        self._keeper, self._writer = keeper, writer
        self._uses: dict[int, _Use] = {}

    def handle(self, number: int | None, method: str, arguments: list[Any]) -> None:
        """One message of the front's."""
        hooks = self._keeper.hooks
        assert hooks is not None
        if method == "end":
            use, is_clean = arguments
            if use in self._uses:
                self._uses[use].end(is_clean)
        elif method == "look_up":
            self._begin(number, arguments[0], self._looked_up(hooks, *arguments[1:]))
        elif method == "admit":
            self._begin(number, arguments[0], hooks.admit(*arguments[1:]))
        else:
            self._count(number, *arguments)

    def push(self, request_ids: list[str]) -> None:
        """Have the front end these requests."""
        write(self._writer, [None, request_ids, None])

    async def end_all(self) -> None:
        """The front is gone, and so are its requests."""
        tasks = [use.task for use in self._uses.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, call: int | None, number: int, opening: AbstractAsyncContextManager[Any]) -> None:
        use = self._uses[number] = _Use(opening, lambda value, error: write(self._writer, [call, value, error]))
        use.task.add_done_callback(lambda _: self._uses.pop(number, None))

    @asynccontextmanager
    async def _looked_up(self, hooks: RequestHooks, model: str) -> AsyncIterator[list[Any] | None]:
        """What a name stands for, kept until the use ends; the adapter is read first if it was not."""
        await hooks.ready(model)
        served = self._keeper.find(model)
        if served is None:
            yield None
            return
        self._keeper.note(model)
        served.hold()
        try:
            yield [served.stored.digest, served.adapter_id, served.stored.path]
        finally:
            served.release()

    def _count(self, call: int | None, name: str, rate: float) -> None:
        try:
            self._keeper.keys.count(Principal(name, rate=rate))
        except HydraServeError as error:
            write(self._writer, [call, None, errors.pack(error)])
        else:
            write(self._writer, [call, None, None])


class _Use:
    """Something that is opened for a front, and closed when the front says so or is gone.

    answer: called with (value, None) when it is open, or (None, error) when it cannot be.
    """

    def __init__(self, opening: AbstractAsyncContextManager[Any], answer: Callable[[Any, Any], None]) -> None:
        self._is_open, self._ended = False, asyncio.Event()
        self.task = asyncio.create_task(self._run(opening, answer))

    def end(self, is_clean: bool) -> None:
        """Close it. is_clean: whether what it was opened for has gone well."""
        if self._is_open and is_clean:
            self._ended.set()
        else:
            self.task.cancel()

    async def _run(self, opening: AbstractAsyncContextManager[Any], answer: Callable[[Any, Any], None]) -> None:
        try:
            async with opening as value:
                answer(value, None)
                self._is_open = True
                await self._ended.wait()
        except HydraServeError as error:
            answer(None, errors.pack(error))
        except Exception as error:
            logger.exception("a call of another API server process failed")
            failed = EngineError("API server processes", got=repr(error), expected="no error", fix="see the log")
            answer(None, errors.pack(failed))


class _QuietServer(uvicorn.Server):
    """uvicorn beside vLLM's own, which gets the signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _FromFronts:
    """ASGI: takes who sent a request from the header that the fronts set."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = [(name, value) for name, value in scope["headers"] if name != CLIENT_HEADER]
            client = next((value.decode() for name, value in scope["headers"] if name == CLIENT_HEADER), "")
            scope = {**scope, "headers": given, "client": (client, 0)}
        await self._app(scope, receive, send)
