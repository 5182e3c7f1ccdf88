"""Calls between API server processes: one JSON text a line, over a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydraserve import errors
from hydraserve.errors import EngineError

SOCKET, HTTP_SOCKET = "link.sock", "http.sock"
# Set by a front on the HTTP requests that it hands on: who sent them.
CLIENT_HEADER = b"x-hydraserve-client"

# Bytes of the longest message; paths and names are much shorter.
LONGEST_MESSAGE = 1 << 20
_RETRY_S = 0.05


class Link:
    """The caller's end: `call` waits for an answer, `tell` does not.

    on_push: called with the arguments of what the other end says by itself.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_push: Callable[[list[Any]], None] = lambda _: None,
    ) -> None:
        self._reader, self._writer, self._on_push = reader, writer, on_push
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._closed = False
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, path: Path, on_push: Callable[[list[Any]], None], timeout_s: float) -> Link:
        """Connect to the socket as soon as it is there. Raises EngineError when that takes too long."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            try:
                return cls(*await asyncio.open_unix_connection(path, limit=LONGEST_MESSAGE), on_push)
            except (FileNotFoundError, ConnectionRefusedError):
                if asyncio.get_running_loop().time() > deadline:
                    raise _lost(f"nothing for {timeout_s:.0f} s") from None
            await asyncio.sleep(_RETRY_S)

    async def call(self, method: str, *arguments: Any) -> Any:
        """The answer. Raises the HydraServeError that the other end raised, or EngineError when it is gone."""
        if self._closed:
            raise _lost("its end")
        number = next(self._numbers)
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        write(self._writer, [number, method, *arguments])
        try:
            return await answer
        finally:
            self._calls.pop(number, None)

    def tell(self, method: str, *arguments: Any) -> None:
        """Say something that has no answer; nothing when the other end is gone."""
        if not self._closed:
            write(self._writer, [None, method, *arguments])

    async def close(self) -> None:
        """End the connection, which the other end takes as the end of everything that this one used."""
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading

    async def _read(self) -> None:
        try:
            async for number, value, error in messages(self._reader):
                if number is None:
                    self._on_push(value)
                elif (answer := self._calls.get(number)) is not None and not answer.done():
                    if error is None:
                        answer.set_result(value)
                    else:
                        answer.set_exception(errors.unpack(error))
        finally:
            self._closed = True
            self._writer.close()
            for answer in self._calls.values():
                if not answer.done():
                    answer.set_exception(_lost("its end"))


async def messages(reader: asyncio.StreamReader) -> Any:
    """What comes, until the connection ends."""
    with contextlib.suppress(ConnectionError):
        async for line in reader:
            yield json.loads(line)


def write(writer: asyncio.StreamWriter, message: Sequence[Any]) -> None:
    """Send one message."""
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


def _lost(got: str) -> EngineError:
    return EngineError(
        what="API server process that keeps the adapters",
        got=got,
        expected="an answer",
        fix="see the log; the server has to be started again",
    )
