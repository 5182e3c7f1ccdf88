"""Which adapters are in host memory, and which one goes when there is no room."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from fake_runtime import FakeRuntime, stored

from hydraserve.errors import UnreadableFileError
from hydraserve.server.lifecycle.host_cache import HostCache

A, B, C, D = (stored(name) for name in "abcd")


def with_cache(test: Callable[[HostCache, FakeRuntime], Awaitable[None]], capacity: int = 2) -> None:
    async def run() -> None:
        runtime = FakeRuntime(host_adapters=capacity)
        await test(HostCache(runtime, capacity), runtime)

    asyncio.run(run())


def test_the_least_recently_used_one_goes() -> None:
    async def test(cache: HostCache, runtime: FakeRuntime) -> None:
        for content in (A, B, A, C):
            async with cache.hold(content):
                assert cache.ready(content.digest)
        assert [cache.ready(content.digest) for content in (A, B, C)] == [True, False, True]
        assert runtime.loads == [A.digest, B.digest, C.digest]
        assert sorted(runtime.host.values()) == sorted([A.digest, C.digest])

    with_cache(test)


def test_what_is_in_use_or_pinned_stays_and_others_wait() -> None:
    async def test(cache: HostCache, runtime: FakeRuntime) -> None:
        await cache.pin(A)
        async with cache.hold(B):
            assert await cache.prefetch(C) is False, "no place, and nothing to wait for"

            async def use() -> None:
                async with cache.hold(C):
                    pass

            waiting = asyncio.create_task(use())
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting
        assert [cache.ready(content.digest) for content in (A, B, C)] == [True, False, True]
        await cache.unpin(A.digest)
        assert runtime.pinned == set()
        assert await cache.prefetch(D)
        assert not cache.ready(A.digest)

    with_cache(test)


def test_one_load_for_all_who_want_it() -> None:
    async def test(cache: HostCache, runtime: FakeRuntime) -> None:
        runtime.gate.clear()

        async def use() -> int:
            async with cache.hold(A) as adapter_id:
                return adapter_id

        tasks = [asyncio.create_task(use()) for _ in range(5)]
        await asyncio.sleep(0)
        assert cache.loading(A.digest)
        tasks[0].cancel()  # the others still want it
        runtime.gate.set()
        ids = await asyncio.gather(*tasks[1:])
        assert len(set(ids)) == 1
        assert runtime.loads == [A.digest]

    with_cache(test)


def test_a_load_that_fails_leaves_its_place_free() -> None:
    async def test(cache: HostCache, runtime: FakeRuntime) -> None:
        runtime.failing[A.digest] = UnreadableFileError("a", got="damage")
        for _ in range(2):
            with pytest.raises(UnreadableFileError):
                async with cache.hold(A):
                    pass
        for content in (B, C):
            async with cache.hold(content):
                pass
        del runtime.failing[A.digest]
        async with cache.hold(A):
            assert cache.ready(A.digest)

    with_cache(test)


def test_dropped_content_frees_its_place_and_its_id() -> None:
    async def test(cache: HostCache, runtime: FakeRuntime) -> None:
        async with cache.hold(A) as first:
            pass
        assert cache.adapter_id(A.digest) == first
        await cache.drop(A.digest)
        assert runtime.host == {}
        assert cache.adapter_id(A.digest) != first, "an id never stands for two loads of the same content"
        await cache.drop(B.digest)  # nothing happens

    with_cache(test)


def test_a_new_adapter_pushes_nothing_out() -> None:
    async def test(cache: HostCache, runtime: FakeRuntime) -> None:
        assert await cache.prefetch(A, evict=False)
        assert await cache.prefetch(B, evict=False)
        assert not await cache.prefetch(C, evict=False)
        assert runtime.loads == [A.digest, B.digest]

    with_cache(test)
