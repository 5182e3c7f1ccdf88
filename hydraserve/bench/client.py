"""Drives an OpenAI-compatible server over HTTP with streaming, as its users do, and notes when each token came.

One thread, and light, because on a CPU the server works on the same cores: bodies are made before the run, what
arrives is only stamped with the time and kept, and it is parsed after the run.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp

from hydraserve.bench.scrape import key_header
from hydraserve.bench.stats import RequestRecord
from hydraserve.bench.workload import Load, Request

# Two minutes without a byte is a server that hangs; a run as a whole may take any time.
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_read=120.0)


@dataclass
class _Exchange:
    """One request and what came back. start: when it was sent, or under an open loop was due; lag: how much later than
    that it was sent."""

    model: str
    body: bytes
    at: float
    start: float = 0.0
    lag: float | None = None
    status: int = 0
    lines: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


def drive(
    url: str,
    requests: Sequence[Request],
    load: Load,
    on_done: Callable[[], None] = lambda: None,
    key: str | None = None,
) -> list[RequestRecord]:
    """Send the requests to `url` (without a path) and wait for the last token of each.

    on_done: called after each request. key: what the server asks for, if anything.

    A request that fails is a record with an error; the others go on.
    """
    exchanges = [_Exchange(r.model, _body(r), r.at) for r in requests]
    headers = {"Content-Type": "application/json", **key_header(key)}
    asyncio.run(_run(f"{url}/v1/completions", headers, exchanges, load, on_done))
    return [_record(exchange) for exchange in exchanges]


def _body(request: Request) -> bytes:
    return json.dumps(
        {
            "model": request.model,
            "prompt": request.prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            # The count in every chunk: one chunk can hold several tokens, and a token need not show as text.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ).encode()


async def _run(
    url: str, headers: Mapping[str, str], exchanges: Sequence[_Exchange], load: Load, on_done: Callable[[], None]
) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=TIMEOUT, connector=connector, headers=headers) as session:
        if load.concurrency is not None:
            queue = iter(exchanges)
            workers = min(load.concurrency, len(exchanges))
            await asyncio.gather(*(_one_after_another(session, url, queue, on_done) for _ in range(workers)))
        else:
            begin = time.perf_counter()
            await asyncio.gather(*(_at_its_time(session, url, e, begin, on_done) for e in exchanges))


async def _one_after_another(
    session: aiohttp.ClientSession, url: str, queue: Iterator[_Exchange], on_done: Callable[[], None]
) -> None:
    for exchange in queue:
        exchange.start = time.perf_counter()
        await _send(session, url, exchange)
        on_done()


async def _at_its_time(
    session: aiohttp.ClientSession, url: str, exchange: _Exchange, begin: float, on_done: Callable[[], None]
) -> None:
    """A late client must not flatter the server: what a request waited to be sent is part of its time, as a user of
    an overloaded server waits too."""
    exchange.start = begin + exchange.at
    await asyncio.sleep(exchange.start - time.perf_counter())
    exchange.lag = max(0.0, time.perf_counter() - exchange.start)
    await _send(session, url, exchange)
    on_done()


async def _send(session: aiohttp.ClientSession, url: str, exchange: _Exchange) -> None:
    try:
        async with session.post(url, data=exchange.body) as response:
            exchange.status = response.status
            async for line in response.content:
                exchange.lines.append((time.perf_counter(), line))
    except (aiohttp.ClientError, TimeoutError, OSError) as e:
        exchange.error = f"{type(e).__name__}: {e}"


def _record(exchange: _Exchange) -> RequestRecord:
    tokens: list[tuple[float, int]] = []
    error, prompt_tokens = exchange.error, 0
    if error is None and exchange.status != 200:
        error = f"HTTP {exchange.status}: {b''.join(line for _, line in exchange.lines)[:500].decode(errors='replace')}"
    if error is None:
        try:
            tokens, prompt_tokens = parse_stream(exchange.lines)
        except (ValueError, KeyError, TypeError) as e:
            error = f"unreadable stream: {e}"
    return RequestRecord(exchange.model, exchange.start, tuple(tokens), prompt_tokens, error, exchange.lag)


def parse_stream(lines: Iterable[tuple[float, bytes]]) -> tuple[list[tuple[float, int]], int]:
    """Server-sent events with their times -> ((time, output tokens so far) of each arrival, prompt tokens).

    Raises ValueError for an error in the stream, for a stream that breaks off, and where tokens are not counted.
    """
    tokens: list[tuple[float, int]] = []
    prompt_tokens, ended = 0, False
    for moment, line in lines:
        if not line.startswith(b"data:"):
            continue  # blank lines, and comments that keep a connection alive
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            ended = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise ValueError(str(chunk["error"]))
        usage = chunk.get("usage")
        if usage is None:
            raise ValueError("a chunk without usage: the server does not know stream_options.continuous_usage_stats")
        prompt_tokens = int(usage["prompt_tokens"])
        count = int(usage["completion_tokens"])
        if count > (tokens[-1][1] if tokens else 0):
            tokens.append((moment, count))
    if not ended or not tokens:
        raise ValueError("the stream broke off" if not ended else "no tokens")
    return tokens, prompt_tokens
