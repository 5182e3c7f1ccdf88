"""Taking an adapter away ends all that its name was served with, and all requests, wherever they are."""

from __future__ import annotations

import asyncio
from pathlib import Path
from select import select

import pytest
from fake_runtime import FakeRuntime, Run

from hydraserve.adapters.sources import Progress
from hydraserve.errors import AdapterConflictError, UnknownAdapterError
from hydraserve.server.lifecycle.admission import Admission
from hydraserve.server.lifecycle.reader import AdapterReader
from hydraserve.server.lifecycle.served import ServedAdapter
from hydraserve.server.lifecycle.service import AdapterService


class Request:
    """One that is let in and stays until `end`, or ends when it is aborted."""

    def __init__(self, service: AdapterService, served: ServedAdapter, request_id: str) -> None:
        self.served, self.inside = served, asyncio.Event()
        self.end = asyncio.Event()
        self.task = asyncio.create_task(self._run(Admission(service), request_id))

    async def _run(self, admission: Admission, request_id: str) -> None:
        async with admission.admit(self.served.adapter_id, self.served.label, request_id):
            self.inside.set()
            await self.end.wait()


async def settle() -> None:
    """Let everything happen that can happen now."""
    for _ in range(50):
        await asyncio.sleep(0)


async def begun(service: AdapterService, name: str, request_id: str) -> Request:
    request = Request(service, service.current[name], request_id)
    await request.inside.wait()
    return request


@pytest.mark.parametrize("force", [False, True])
def test_requests_of_a_replaced_version_count_too(run: Run, versions: list[Path], force: bool) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        await service.add("a", str(versions[0]))
        old = await begun(service, "a", "old")
        await service.replace("a", str(versions[1]))
        new = await begun(service, "a", "new")
        removing = asyncio.create_task(service.remove("a", force=force))
        await settle()
        assert sorted(runtime.aborted) == (["new", "old"] if force else [])
        new.end.set()
        await new.task
        await settle()
        assert not removing.done(), "the replaced version is still in use"
        old.end.set()
        await old.task
        await removing
        assert (runtime.host, sorted(runtime.evicted)) == ({}, sorted([old.served.label, new.served.label]))

    run(test)


def test_a_removal_waits_for_what_is_being_freed_already(
    run: Run, versions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        await service.add("a", str(versions[0]))
        old, may_go, evict = service.current["a"], asyncio.Event(), runtime.evict_blocks

        async def slow_for_old(label: str) -> int:
            if label == old.label:
                await may_go.wait()
            return await evict(label)

        monkeypatch.setattr(runtime, "evict_blocks", slow_for_old)
        await service.replace("a", str(versions[1]))
        removing = asyncio.create_task(service.remove("a"))
        await settle()
        assert not removing.done()
        may_go.set()
        await removing
        assert runtime.host == {}

    run(test)


def test_waiting_requests_are_refused_at_once(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        for i in range(3):
            await service.add(f"a{i}", str(versions[i]))
        running = [await begun(service, f"a{i}", f"r{i}") for i in range(2)]
        waiting = Request(service, service.current["a2"], "late")
        await settle()
        assert service.current["a2"].waiting == 1
        await service.remove("a2", force=True)  # although nobody gives a slot up
        with pytest.raises(UnknownAdapterError, match="still served"):
            await waiting.task
        assert service.turnstile.waiting(waiting.served.stored.digest) == 0
        for request in running:
            request.end.set()
        await asyncio.gather(*(request.task for request in running))
        assert len(runtime.host) == 2

    run(test)


def test_requests_whose_adapter_is_being_loaded_are_refused(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        await service.add("a", str(versions[0]))
        await service.cache.drop(service.current["a"].stored.digest)
        runtime.gate.clear()
        loading = Request(service, service.current["a"], "r1")
        await settle()
        assert service.cache.loading(loading.served.stored.digest)
        removing = asyncio.create_task(service.remove("a", force=True))
        with pytest.raises(UnknownAdapterError):
            await loading.task
        runtime.gate.set()
        await removing
        assert runtime.host == {}

    run(test)


def test_a_download_does_not_keep_its_removal_waiting(
    run: Run, versions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*arguments: object) -> Path:
        progress = arguments[-1]
        assert isinstance(progress, Progress)
        while not progress.stopped:
            select((), (), (), 0.001)
        raise AdapterConflictError("download", got="no wish for it")

    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        monkeypatch.setattr(AdapterReader, "_fetch", download)
        adding = asyncio.create_task(service.add("a", str(versions[0])))
        while "a" not in service.progress:
            await asyncio.sleep(0)
        await service.remove("a")
        with pytest.raises(AdapterConflictError):
            await adding
        with pytest.raises(UnknownAdapterError):
            await service.remove("a")
        assert (len(service.registry), runtime.host) == (0, {})

    run(test)


def test_the_same_content_may_come_back_while_it_goes(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        await service.add("a", str(versions[0]))
        old = await begun(service, "a", "old")
        removing = asyncio.create_task(service.remove("a", force=True))
        await settle()
        await service.add("a", str(versions[0]))
        again = await begun(service, "a", "again")
        for request in (old, again):
            request.end.set()
            await request.task
        await removing
        assert list(runtime.host.values()) == [old.served.stored.digest]

    run(test)
