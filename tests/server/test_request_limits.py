"""What is refused before a request is parsed, through the middleware and a real parser behind it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from hydraserve.errors import InvalidRequestError
from hydraserve.server import limits
from hydraserve.server.json_limits import MAX_NESTING, check_json, check_other
from hydraserve.server.limits import LimitMiddleware
from hydraserve.server.traffic import Traffic

PATH = "/v1/completions"
LIMIT = 1000


class App:
    """An app that answers with the body it got, and how many requests ran meanwhile."""

    def __init__(self, body_pause_s: float = 5.0, max_body: int = LIMIT) -> None:
        self.traffic = Traffic(limit=2)
        app = self.app = FastAPI()
        app.post(PATH)(self.answer)
        app.post("/other")(self.answer)
        app.post("/v1/stream")(self.stream)
        self.asgi = LimitMiddleware(app, self.traffic, max_body, body_pause_s)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=self.asgi), base_url="http://test")

    async def answer(self, request: Request) -> dict[str, Any]:
        return {"got": (await request.body()).decode(), "running": self.traffic.running}

    async def stream(self) -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            yield str(self.traffic.running)

        return StreamingResponse(pieces())

    async def post(self, receive: Callable[[], Awaitable[dict[str, Any]]], path: str = PATH) -> tuple[int, Any]:
        """Status and body of the answer to a request whose pieces `receive` gives."""
        messages: list[Any] = []

        async def send(message: Any) -> None:
            messages.append(message)

        await self.asgi(
            {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}, receive, send
        )
        return messages[0]["status"], json.loads(messages[1]["body"])


def piece(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_within_the_limits_arrives_whole_and_counts_until_it_is_answered() -> None:
    async def run() -> None:
        app = App()
        answer = await app.http.post(PATH, content=b"[1, 2]")
        assert answer.json() == {"got": "[1, 2]", "running": 1}
        assert (await app.http.post("/other", content=b"[]")).json() == {"got": "[]", "running": 0}
        assert (await app.http.post("/v1/stream")).text == "1"
        assert app.traffic.running == 0

    asyncio.run(run())


@pytest.mark.parametrize("announced", [True, False])
def test_a_larger_body_is_413(announced: bool) -> None:
    def pieces() -> Iterator[bytes]:
        yield from [b"x" * 300] * 4

    async def stream() -> AsyncIterator[bytes]:
        for piece in pieces():
            yield piece

    async def run() -> None:
        app = App()
        answer = await app.http.post(PATH, content=b"".join(pieces()) if announced else stream())
        assert answer.status_code == 413
        assert "--max-body-mib" in answer.json()["error"]["message"]
        assert answer.headers["connection"] == "close"

    asyncio.run(run())


def test_a_full_server_answers_503_before_it_reads_the_body() -> None:
    async def run() -> None:
        app = App()
        with app.traffic.request(), app.traffic.request():
            answer = await app.http.post(PATH, content=b"{}")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["type"] == "ServiceUnavailableError"
        assert (await app.http.post(PATH, content=b"{}")).status_code == 200

    asyncio.run(run())


def test_a_body_that_stops_coming_is_408_and_takes_no_place() -> None:
    async def run() -> None:
        app, sent = App(body_pause_s=0.05), []

        async def receive() -> dict[str, Any]:
            assert app.traffic.running == 0
            if not sent:
                sent.append(1)
                return piece(b"{")
            await asyncio.Event().wait()
            raise AssertionError

        status, answer = await app.post(receive)
        assert status == 408
        assert answer["error"]["reason"] == "SlowRequestError"
        assert "nothing more" in answer["error"]["message"]

    asyncio.run(run())


def test_a_body_that_comes_byte_by_byte_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SLOWEST_BYTES_S", 1 << 30)

    async def run() -> None:
        app = App(body_pause_s=0.05, max_body=1 << 20)

        async def receive() -> dict[str, Any]:
            return piece(b"" if app.asgi.bodies.held else b" ")

        status, answer = await app.post(receive)
        assert status == 408
        assert "bytes of it in" in answer["error"]["message"]

    asyncio.run(run())


def test_bodies_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Senders that keep the last byte back cannot fill the memory, nor keep small requests out."""
    monkeypatch.setattr(limits, "BODIES_AT_ONCE", 2)

    async def run() -> None:
        app = App(max_body=1 << 20)
        large = b" " * (1 << 20)
        rest, held = asyncio.Event(), [asyncio.Event() for _ in range(2)]

        async def post_all_but_one_byte(begun: asyncio.Event) -> tuple[int, Any]:
            pieces = [piece(large[1:])]

            async def receive() -> dict[str, Any]:
                if pieces:
                    return pieces.pop()
                begun.set()
                await rest.wait()
                return piece(b" ", more=False)

            return await app.post(receive, "/other")

        holding = [asyncio.create_task(post_all_but_one_byte(event)) for event in held]
        for event in held:
            await event.wait()
        refused = await app.http.post(PATH, content=large)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["reason"] == "BusyError"
        assert (await app.http.post(PATH, content=b"[1, 2]")).status_code == 200
        rest.set()
        assert [status for status, _ in await asyncio.gather(*holding)] == [200, 200]
        assert app.asgi.bodies.held == 0
        assert (await app.http.post(PATH, content=large)).status_code == 200

    asyncio.run(run())


def test_a_body_counts_until_its_request_is_answered() -> None:
    async def run() -> None:
        app = App(max_body=1 << 20)
        held: list[int] = []

        async def note() -> None:
            held.append(app.asgi.bodies.held)

        app.app.post("/v1/note")(note)
        assert (await app.http.post("/v1/note", content=b" " * (1 << 20))).status_code == 200
        assert held == [(1 << 20) - limits.UNCOUNTED]
        assert app.asgi.bodies.held == 0

    asyncio.run(run())


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"x\\"]": ', b'[["\\\\", '])
def test_nesting_is_limited(opening: bytes) -> None:
    levels = opening.count(b"[") + opening.count(b"{")
    for check in (check_json, check_other):
        check(opening * (MAX_NESTING // levels))
        with pytest.raises(InvalidRequestError, match="levels"):
            check(opening * (MAX_NESTING // levels + 1))


def test_nesting_is_counted_over_the_whole_of_a_large_body() -> None:
    """It is looked at piece by piece: depth and strings go on in the next one."""
    for far in (b" " * 300_000, b'"' + b"[" * 300_000 + b'",', b'"\\\\' + b"]" * 300_001 + b'",'):
        check_json(b"[" * 60 + far + b"[" * 40)
        with pytest.raises(InvalidRequestError, match="levels"):
            check_json(b"[" * 60 + far + b"[" * 41)


def test_brackets_in_strings_and_side_by_side_are_no_nesting() -> None:
    flat = [{"text": "[[[{{{" * 50 + '\\"' * 5, "list": []}] * 200
    check_json(json.dumps(flat).encode())


FITTING = [2**63 - 1, -(2**63), 10**18, -(10**18), 1.5e300]
FLOATS = ["9223372036854775808.0", "0.12345678901234567890123", "1e00000000000000000000001", "9" * 20 + "E-5"]


@pytest.mark.parametrize("text", [*map(str, FITTING), *FLOATS, '"' + "9" * 40 + '"', '"\\"' + "9" * 40 + '"'])
def test_integers_of_64_bits_and_other_numbers_pass(text: str) -> None:
    for body in (text, f"[{text},{text}]", f'{{"seed": {text} }}'):
        json.loads(body)
        check_json(body.encode())


@pytest.mark.parametrize("text", [str(2**63), str(-(2**63) - 1), str(10**19), "-" + "9" * 19, "9" * 5000])
def test_larger_integers_are_refused(text: str) -> None:
    for body in (text, f"[7,{text}", f'{{"seed": [1.5, {2**63 - 1}, "x", {text}]}}'):
        with pytest.raises(InvalidRequestError, match="64 bits"):
            check_json(body.encode())
        check_other(body.encode())


SIZE = 4 << 20
EXPENSIVE = {
    "lists": b"[],",
    "strings": b'"",',
    "escapes": b"\\n",
    "escaped backslashes": b"\\\\",
    "escaped quotes": b'\\"',
    "short numbers": b"1,",
    "long numbers": b"1234567890123456789,",
    "long floats": b"0.12345678901234567890,",
    "digits": b"1",
}


@pytest.mark.parametrize("piece", EXPENSIVE.values(), ids=EXPENSIVE)
def test_what_a_check_takes_does_not_depend_on_what_is_in_a_body(piece: bytes) -> None:
    start = b"[" + b"[]," * MAX_NESTING + b"1234567890123456789, 1." + b'"' * (piece[:1] == b"\\")
    body = start + piece * (SIZE // len(piece))
    begun = time.thread_time()
    check_json(body)
    # A tenth of a second or less; an operation of Python's for each piece would take many times the limit.
    assert time.thread_time() - begun < 0.7
    tracemalloc.start()
    try:
        check_json(body)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(body)
    finally:
        tracemalloc.stop()


def test_large_bodies_are_checked_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(limits, "check_json", lambda _: threads.append(threading.get_ident()))

    async def run() -> None:
        app = App(max_body=1 << 20)
        for size in (10, 1 << 20):
            assert (await app.http.post(PATH, content=b" " * size)).status_code == 200

    asyncio.run(run())
    assert threads[0] == threading.get_ident() != threads[1]


def test_numbers_of_other_bodies_than_json_do_not_matter() -> None:
    async def run() -> None:
        app = App()
        for kind, status in (
            ("multipart/form-data; boundary=--735323031399963166993862150", 200),
            ("application/json; charset=utf-8", 400),
            ("application/merge-patch+json", 400),
        ):
            answer = await app.http.post(PATH, content=b"735323031399963166993862150", headers={"Content-Type": kind})
            assert answer.status_code == status, kind

    asyncio.run(run())


def test_json_that_is_not_utf_8_is_refused() -> None:
    async def run() -> None:
        app = App()
        answer = await app.http.post(PATH, content=b'"\xff"', headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert "0xff" in answer.json()["error"]["message"]

    asyncio.run(run())
