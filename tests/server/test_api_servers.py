"""Several API server processes, as parts of one process: the sockets between them are real."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_runtime import FakeRuntime, MakeService
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from hydraserve.adapters.checkpoint import load_adapter
from hydraserve.adapters.registry import AdapterEntry, Origin
from hydraserve.errors import AdapterNotFoundError, EngineError, RateLimitError, UnknownAdapterError
from hydraserve.server.api_servers.forward import ForwardMiddleware
from hydraserve.server.api_servers.front import FoundAdapters, Front
from hydraserve.server.api_servers.keeper import Keeper
from hydraserve.server.keys import KeyRing, Principal
from hydraserve.server.lifecycle.admission import Admission
from hydraserve.server.lifecycle.served import RequestScope, ServedAdapter, current_scope
from hydraserve.server.lifecycle.service import AdapterService


class Pair:
    """A keeper and one front of it. started, ended: what the keeper's application has seen of slow requests."""

    def __init__(self, service: AdapterService, runtime: FakeRuntime, front: Front, keeper: Keeper) -> None:
        self.service, self.runtime, self.front, self.keeper = service, runtime, front, keeper
        self.found = FoundAdapters()

    @property
    def client(self) -> httpx.AsyncClient:
        """Of an application in front, with nothing of its own."""
        app = FastAPI()
        app.add_middleware(ForwardMiddleware, front=lambda: self.front)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=("192.0.2.7", 1)), base_url="http://front")


Test = Callable[[Pair], Awaitable[None]]
Run = Callable[[Test], None]


def make_app() -> FastAPI:
    app = FastAPI()

    @app.api_route("/v1/adapters/{rest:path}", methods=["GET", "PUT"])
    async def echo(request: Request) -> dict[str, Any]:
        body = await request.body()
        sender = request.client.host if request.client else None
        url = f"http://{request.headers['host']}{request.scope['raw_path'].decode()}?{request.url.query}"
        return {"url": url, "sender": sender, "headers": dict(request.headers), "body": body.decode()}

    @app.post("/v1/routing")
    async def stream() -> StreamingResponse:
        async def pieces() -> Any:
            for i in range(3):
                yield f"{i},"

        return StreamingResponse(pieces(), 207)

    return app


@pytest.fixture
def run(make_service: MakeService, versions: list[Path]) -> Run:
    def run(test: Test) -> None:
        async def whole() -> None:
            runtime = FakeRuntime(slots=2, host_adapters=3)
            service = make_service(runtime, versions[0].parent)
            with tempfile.TemporaryDirectory() as text:
                folder = Path(text)
                keeper = Keeper(folder, make_app(), KeyRing(), service.current.get)
                service.abort_elsewhere = keeper.abort
                front = Front(folder, FakeRuntime())
                await asyncio.gather(keeper.start(Admission(service), 1, 20), front.connect(20))
                await test(Pair(service, runtime, front, keeper))
                for part in (front, keeper, service):
                    await part.close()

        asyncio.run(asyncio.wait_for(whole(), 60))

    return run


@contextmanager
def request_of(name: str = "anyone", adapters: tuple[str, ...] = ("*",)) -> Iterator[RequestScope]:
    scope = RequestScope(Principal(name, adapters=adapters))
    token = current_scope.set(scope)
    try:
        yield scope
    finally:
        current_scope.reset(token)
        scope.end()


async def three(pair: Pair, versions: list[Path]) -> list[ServedAdapter]:
    """Adapters: one more than there are slots."""
    for i in range(3):
        await pair.service.add(f"a{i}", str(versions[i]))
    return [pair.service.current[f"a{i}"] for i in range(3)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_name_stands_for_what_the_keeper_says_until_the_request_ends(run: Run, versions: list[Path]) -> None:
    async def test(pair: Pair) -> None:
        await pair.service.add("a", str(versions[0]))
        old = pair.service.current["a"]
        with request_of() as scope:
            await pair.front.ready("a")
            assert list(pair.found) == ["a"]
            await pair.service.replace("a", str(versions[1]))
            assert pair.found["a"] == pair.front._runtime.request(old.label, old.adapter_id, old.stored.path)
            assert scope.adapter is not None
            assert scope.adapter.version == old.version
            assert len(pair.runtime.host) == 2  # the old content is held
            async with pair.front.admit(old.adapter_id, old.label, "r1"):
                assert old.request_ids == ["r1"]
        await until(lambda: len(pair.runtime.host) == 1)
        assert old.served == 1
        with request_of() as scope:
            await pair.front.ready("a")
            assert pair.found["a"] is not None
            assert scope.adapter is not None
            assert scope.adapter.version == f"a@{load_adapter(versions[1]).digest}"

    run(test)


def test_a_front_s_request_knows_how_long_it_waited_for_its_adapter(run: Run, versions: list[Path]) -> None:
    async def test(pair: Pair) -> None:
        pair.service.register("late", str(versions[0]), Origin.DIRECTORY)
        with request_of() as scope:
            await pair.front.ready("late")
        read = pair.service.registry.get("late").load_seconds
        assert read is not None
        assert 0 < read < scope.waited

    run(test)


def test_names_that_stand_for_nothing(run: Run, versions: list[Path]) -> None:
    async def test(pair: Pair) -> None:
        await pair.service.add("a", str(versions[0]))
        with request_of("tenant", adapters=("b",)):
            for name in ("a", "base", "nobody"):
                await pair.front.ready(name)
            assert list(pair.found) == []
            assert "a" not in pair.found
        assert list(pair.found) == []  # outside a request
        await until(lambda: not pair.service.current["a"].in_use)

    run(test)


def test_errors_come_over(run: Run, versions: list[Path]) -> None:
    async def test(pair: Pair) -> None:
        pair.service.registry.put(AdapterEntry("gone", str(versions[0].parent / "missing"), Origin.API))
        with request_of(), pytest.raises(AdapterNotFoundError, match="missing"):
            await pair.front.ready("gone")
        with pytest.raises(UnknownAdapterError, match="a@123"):
            async with pair.front.admit(1, "a@123", "r1"):
                pass
        slow = Principal("slow", rate=6)
        await pair.front.count(slow)
        with pytest.raises(RateLimitError, match="6 a minute") as error:
            await pair.front.count(slow)
        assert 5 < error.value.retry_after <= 10

    run(test)


def test_turns_are_those_of_all_processes(run: Run, versions: list[Path]) -> None:
    async def test(pair: Pair) -> None:
        served = await three(pair, versions)
        ends = [asyncio.Event() for _ in range(3)]
        inside: list[int] = []

        async def request(i: int) -> None:
            hooks = pair.front if i % 2 else Admission(pair.service)
            async with hooks.admit(served[i].adapter_id, served[i].label, f"r{i}"):
                inside.append(i)
                await ends[i].wait()

        tasks = []
        for i in range(3):
            tasks.append(asyncio.create_task(request(i)))
            await until(lambda i=i: served[i].in_use)  # type: ignore[misc]
        await until(lambda: len(inside) == 2)
        assert served[2].waiting == 1
        ends[inside[0]].set()
        await until(lambda: len(inside) == 3)
        assert served[2].waiting == 0
        for end in ends:
            end.set()
        await asyncio.gather(*tasks)
        await until(lambda: not any(s.in_use for s in served))

    run(test)


def test_who_gives_up_leaves_no_trace(run: Run, versions: list[Path]) -> None:
    async def test(pair: Pair) -> None:
        served = await three(pair, versions)

        async def request(i: int) -> None:
            async with pair.front.admit(served[i].adapter_id, served[i].label, f"r{i}"):
                await asyncio.Event().wait()

        tasks = [asyncio.create_task(request(i)) for i in range(3)]
        await until(lambda: pair.service.turnstile.active == 2 and all(s.in_use for s in served))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: not any(s.in_use for s in served))
        assert pair.service.turnstile.active == 0
        assert [s.served for s in served] == [0, 0, 0]

    run(test)


def test_what_a_lost_front_used_is_free(run: Run, versions: list[Path]) -> None:
    async def test(pair: Pair) -> None:
        await pair.service.add("a", str(versions[0]))
        served = pair.service.current["a"]
        with request_of():
            await pair.front.ready("a")
            async with pair.front.admit(served.adapter_id, served.label, "r1"):
                assert served.in_use
                assert not pair.keeper.wait_for_fronts(0)
                pair.front.leave()
                await until(lambda: not served.in_use)
                assert await asyncio.to_thread(pair.keeper.wait_for_fronts, 20)
        assert pair.service.turnstile.active == 0
        with pytest.raises(EngineError, match="got its end"):
            await pair.front.count(Principal("x", rate=1))

    run(test)


def test_a_forced_removal_reaches_the_fronts(run: Run, versions: list[Path]) -> None:
    async def test(pair: Pair) -> None:
        await pair.service.add("a", str(versions[0]))
        served = pair.service.current["a"]
        runtime = pair.front._runtime
        assert isinstance(runtime, FakeRuntime)
        async with pair.front.admit(served.adapter_id, served.label, "r1"):
            removing = asyncio.create_task(pair.service.remove("a", force=True))
            await until(lambda: runtime.aborted == ["r1"])
        await removing
        assert pair.runtime.host == {}

    run(test)


def test_requests_about_adapters_are_handed_on(run: Run) -> None:
    async def test(pair: Pair) -> None:
        headers = {"x-hydraserve-client": "127.0.0.1", "authorization": "Bearer k", "connection": "x"}
        async with pair.client as client:
            text = json.dumps({"n": "ü" * 70_000})
            answer = (await client.put("/v1/adapters/a%2Fb/c?force=1&x=%20", content=text, headers=headers)).json()
            assert answer["url"] == "http://front/v1/adapters/a%2Fb/c?force=1&x=%20"
            assert answer["sender"] == "192.0.2.7"
            assert answer["body"] == text
            assert answer["headers"]["authorization"] == "Bearer k"
            assert "x-hydraserve-client" not in answer["headers"]
            streamed = await client.post("/v1/routing")
            assert (streamed.status_code, streamed.text) == (207, "0,1,2,")
            assert (await client.get("/v1/adapters/x")).json()["url"] == "http://front/v1/adapters/x?"
            assert (await client.get("/v1/adaptersx")).status_code == 404
            await pair.keeper.close()
            gone = await client.get("/v1/adapters/x")
            assert gone.status_code == 503
            assert "retry-after" in gone.headers

    run(test)
