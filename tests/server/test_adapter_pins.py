"""A slot of its own: an adapter gets it when no request that runs needs it, as the engine would take it away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fake_runtime import FakeRuntime, MakeService

from hydraserve.errors import AdapterConflictError
from hydraserve.server.lifecycle.admission import Admission
from hydraserve.server.lifecycle.service import AdapterService

Test = Callable[[AdapterService, FakeRuntime], Awaitable[None]]
Run = Callable[[Test], None]


@pytest.fixture
def run(make_service: MakeService, versions: list[Path]) -> Run:
    """Run a test with the adapters a0 to a3, of which two fit the slots."""

    def run(test: Test) -> None:
        async def whole() -> None:
            runtime = FakeRuntime(slots=2, host_adapters=6)
            service = make_service(runtime, versions[0].parent)
            for i, path in enumerate(versions):
                await service.add(f"a{i}", str(path))
            await test(service, runtime)
            await service.close()

        asyncio.run(asyncio.wait_for(whole(), 60))

    return run


@asynccontextmanager
async def request(service: AdapterService, runtime: FakeRuntime, name: str) -> AsyncIterator[None]:
    served = service.current[name]
    async with Admission(service).admit(served.adapter_id, served.label, f"of {name}"):
        with runtime.run(served.adapter_id):
            yield


async def settle() -> None:
    """Let everything happen that can happen now."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_a_pin_waits_for_a_slot_that_no_request_needs(run: Run) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        async with request(service, runtime, "a1"):
            async with request(service, runtime, "a0"):
                pinning = asyncio.create_task(service.pin("a2", True))
                await settle()
                assert (pinning.done(), runtime.pinned) == (False, set())
                with pytest.raises(AdapterConflictError, match="slots"):
                    await service.pin("a3", True)
            await asyncio.wait_for(pinning, 10)
            async with request(service, runtime, "a2"):
                assert runtime.pinned == {service.current["a2"].adapter_id}

    run(test)


def test_a_running_adapter_is_pinned_at_once(run: Run) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        async with request(service, runtime, "a0"), request(service, runtime, "a1"):
            await asyncio.wait_for(service.pin("a1", True), 10)
            async with request(service, runtime, "a1"):
                assert runtime.pinned == {service.current["a1"].adapter_id}

    run(test)


def test_a_pinned_adapter_is_replaced_while_its_requests_and_others_run(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        await service.pin("a0", True)
        async with request(service, runtime, "a0"), request(service, runtime, "a1"):
            replacing = asyncio.create_task(service.replace("a0", str(versions[2])))
            while service.current["a0"].stored != service.registry.get("a2").version:
                await asyncio.sleep(0)

            async def ask() -> None:
                async with request(service, runtime, "a0"):
                    pass

            asking = asyncio.create_task(ask())
            await settle()
            assert not asking.done(), "both slots are in use"
            assert not replacing.done()
        await asyncio.wait_for(asyncio.gather(asking, replacing), 10)
        assert service.registry.get("a0").pinned
        assert runtime.pinned == {service.current["a0"].adapter_id}

    run(test)


def test_a_pin_that_is_given_up_leaves_the_slots_as_they_were(run: Run) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        async with request(service, runtime, "a0"), request(service, runtime, "a1"):
            pinning = asyncio.create_task(service.pin("a2", True))
            await settle()
            pinning.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pinning
        assert not service.registry.get("a2").pinned
        async with request(service, runtime, "a0"), request(service, runtime, "a3"):
            assert runtime.pinned == set()

    run(test)


def test_requests_that_keep_coming_do_not_keep_a_pin_waiting(run: Run) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        ended = False

        async def keep_asking(name: str) -> None:
            while not ended:
                async with request(service, runtime, name):
                    await asyncio.sleep(0.01)

        clients = [asyncio.create_task(keep_asking(name)) for name in ("a0", "a0", "a1", "a1")]
        await settle()
        await asyncio.wait_for(service.pin("a2", True), 10)
        ended = True
        await asyncio.gather(*clients)
        assert runtime.pinned == {service.current["a2"].adapter_id}

    run(test)
