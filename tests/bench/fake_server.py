"""A tiny OpenAI-like server on a real socket, for the benchmark's tests."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.typedefs import Handler

METRICS = """\
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0"}} {tokens}
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="16",num_gpu_blocks="100"}} 1
"""


@dataclass
class FakeServer:
    """One token after `first_s`, the others every `next_s`; keeps what it was asked and how much
    went on at once.

    Model "two" streams two tokens at a time, "missing" is answered with 404, "breaks" breaks off after a token, and
    "error" reports one inside the stream.
    """

    url: str = ""
    bodies: list[dict[str, object]] = field(default_factory=list)
    written: list[list[float]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    first_s: float = 0.0
    next_s: float = 0.0
    tokens: int = 0
    key: str = ""  # asked for, when there is one

    @web.middleware
    async def check_key(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        return await handler(request)

    async def models(self, _: web.Request) -> web.Response:
        cards = [{"id": "base", "parent": None}, {"id": "one", "parent": "base"}, {"id": "two", "parent": "base"}]
        return web.json_response({"object": "list", "data": cards})

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=METRICS.format(tokens=self.tokens))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if body["model"] == "missing":
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        self.running += 1
        self.most = max(self.most, self.running)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self.stream(response, body)
        self.running -= 1
        return response

    async def stream(self, response: web.StreamResponse, body: dict[str, object]) -> None:
        step = 2 if body["model"] == "two" else 1
        written: list[float] = []
        self.written.append(written)
        await response.write(b": ping\n\n")
        for count in range(step, int(str(body["max_tokens"])) + 1, step):
            await asyncio.sleep(self.next_s if written else self.first_s)
            written.append(time.perf_counter())
            self.tokens += step
            usage = {"prompt_tokens": 3, "completion_tokens": count}
            await send(response, {"choices": [{"text": "x"}], "usage": usage})
            if body["model"] == "breaks":
                return
            if body["model"] == "error":
                await send(response, {"error": {"message": "engine died"}})
        await send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")


async def send(response: web.StreamResponse, chunk: dict[str, object]) -> None:
    await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


@contextmanager
def serving() -> Iterator[FakeServer]:
    """A FakeServer on a free port, in a thread of its own; its sockets are closed at the end."""
    server, ready, done = FakeServer(), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(_serve(server, ready, done),), daemon=True)
    thread.start()
    if not ready.wait(30):
        raise TimeoutError("the fake server did not start")
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(30)
        loop.close()


async def _serve(server: FakeServer, ready: threading.Event, done: asyncio.Event) -> None:
    app = web.Application(middlewares=[server.check_key])
    app.router.add_post("/v1/completions", server.completions)
    app.router.add_get("/v1/models", server.models)
    app.router.add_get("/metrics", server.metrics)
    runner = web.AppRunner(app, shutdown_timeout=1.0)  # what is still streamed then has lost its reader
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    ready.set()
    await done.wait()
    await runner.cleanup()
