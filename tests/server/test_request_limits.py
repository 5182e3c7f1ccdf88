"""What is refused before a request is parsed, through the middleware and a real parser behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from hydraserve.errors import InvalidRequestError
from hydraserve.server.limits import MAX_NESTING, LimitMiddleware, check_integers, check_nesting
from hydraserve.server.traffic import Traffic

PATH = "/v1/completions"
LIMIT = 1000


class App:
    """An app that answers with the body it got, and how many requests ran meanwhile."""

    def __init__(self, body_pause_s: float = 5.0) -> None:
        self.traffic = Traffic(limit=2)
        app = FastAPI()
        app.post(PATH)(self.answer)
        app.post("/other")(self.answer)
        app.post("/v1/stream")(self.stream)
        self.asgi = LimitMiddleware(app, self.traffic, LIMIT, body_pause_s)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=self.asgi), base_url="http://test")

    async def answer(self, request: Request) -> dict[str, Any]:
        return {"got": (await request.body()).decode(), "running": self.traffic.running}

    async def stream(self) -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            yield str(self.traffic.running)

        return StreamingResponse(pieces())


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
                return {"type": "http.request", "body": b"{", "more_body": True}
            await asyncio.Event().wait()
            raise AssertionError

        answers: list[Any] = []

        async def send(message: Any) -> None:
            answers.append(message)

        await app.asgi({"type": "http", "method": "POST", "path": PATH, "headers": []}, receive, send)
        assert answers[0]["status"] == 408
        assert json.loads(answers[1]["body"])["error"]["reason"] == "SlowRequestError"

    asyncio.run(run())


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"x\\"]": '])
def test_nesting_is_limited(opening: bytes) -> None:
    levels = opening.count(b"[") + opening.count(b"{")
    check_nesting(opening * (MAX_NESTING // levels))
    with pytest.raises(InvalidRequestError, match="levels"):
        check_nesting(opening * (MAX_NESTING // levels + 1))


def test_brackets_in_strings_and_side_by_side_are_no_nesting() -> None:
    flat = [{"text": "[[[{{{" * 50 + '\\"' * 5, "list": []}] * 200
    check_nesting(json.dumps(flat).encode())


def test_integers_have_64_bits() -> None:
    for number in (2**63 - 1, -(2**63), 1.5e300):
        check_integers(json.dumps({"seed": number, "user": "9" * 40}).encode())
    for text in (str(2**63), str(-(2**63) - 1), "9" * 5000):
        with pytest.raises(InvalidRequestError, match="64 bits"):
            check_integers(b'{"seed": [' + text.encode() + b"]}")


def test_json_that_is_not_utf_8_is_refused() -> None:
    async def run() -> None:
        app = App()
        answer = await app.http.post(PATH, content=b'"\xff"', headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert "0xff" in answer.json()["error"]["message"]

    asyncio.run(run())
