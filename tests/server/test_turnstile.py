"""Turns of adapters on slots: nobody keeps a slot while others wait, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import random

import pytest

from hydraserve.server.lifecycle.turnstile import Turnstile


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def settle() -> None:
    """Let everything happen that can happen now."""
    for _ in range(10):
        await asyncio.sleep(0)


async def begin(turnstile: Turnstile, adapter: str) -> asyncio.Task[None]:
    task = asyncio.create_task(turnstile.enter(adapter))
    await settle()
    return task


def test_as_many_adapters_as_slots_are_let_in_and_any_number_of_their_requests() -> None:
    async def run() -> None:
        turnstile = Turnstile(2, clock=Clock())
        tasks = [await begin(turnstile, adapter) for adapter in "aaabbc"]
        assert [task.done() for task in tasks] == [True] * 5 + [False]
        assert (turnstile.active, turnstile.waiting("c"), turnstile.has_place) == (2, 1, False)
        for _ in "bb":
            turnstile.leave("b")
        await settle()
        assert tasks[5].done()

    asyncio.run(run())


def test_a_turn_ends_when_its_time_is_over_and_somebody_waits() -> None:
    async def run() -> None:
        clock = Clock()
        turnstile = Turnstile(1, turn_s=1.0, clock=clock)
        await begin(turnstile, "a")
        other = await begin(turnstile, "b")
        clock.now = 0.5
        assert (await begin(turnstile, "a")).done(), "within its turn"
        clock.now = 1.5
        late = await begin(turnstile, "a")
        assert not late.done(), "its turn is over"
        turnstile.leave("a")
        turnstile.leave("a")
        await settle()
        assert other.done()
        assert not late.done(), "one turn after the other"
        turnstile.leave("b")
        await settle()
        assert late.done()

    asyncio.run(run())


def test_without_others_a_turn_goes_on() -> None:
    async def run() -> None:
        clock = Clock()
        turnstile = Turnstile(1, clock=clock)
        await begin(turnstile, "a")
        clock.now = 100.0
        assert (await begin(turnstile, "a")).done()

    asyncio.run(run())


def test_those_with_a_slot_of_their_own_pass_and_do_not_count() -> None:
    async def run() -> None:
        turnstile = Turnstile(2, clock=Clock())
        turnstile.set_slots(1, {"pinned"})
        assert (await begin(turnstile, "pinned")).done()
        assert (await begin(turnstile, "a")).done()
        waiting = await begin(turnstile, "b")
        assert not waiting.done()
        assert (await begin(turnstile, "pinned")).done()
        turnstile.set_slots(2)
        turnstile.leave("pinned")
        turnstile.leave("pinned")
        await settle()
        assert waiting.done()

    asyncio.run(run())


def test_who_gives_up_is_forgotten() -> None:
    async def run() -> None:
        turnstile = Turnstile(1, clock=Clock())
        await begin(turnstile, "a")
        gone, stays = await begin(turnstile, "b"), await begin(turnstile, "c")
        assert turnstile.next(5) == ["b", "c"]
        gone.cancel()
        await settle()
        assert turnstile.next(5) == ["c"]
        turnstile.leave("a")
        await settle()
        assert stays.done()
        turnstile.leave("c")
        assert turnstile.active == 0

    asyncio.run(run())


def test_cancelled_at_the_moment_of_being_let_in_gives_the_slot_back() -> None:
    async def run() -> None:
        turnstile = Turnstile(1, clock=Clock())
        await begin(turnstile, "a")
        task = await begin(turnstile, "b")
        turnstile.leave("a")  # lets b in ...
        task.cancel()  # ... before it has noticed
        with pytest.raises(asyncio.CancelledError):
            await task
        assert turnstile.active == 0

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_under_random_load_every_adapter_gets_its_turn(seed: int) -> None:
    """16 adapters, 8 slots, half of them asking without a pause: the longest wait is a few turns."""

    async def run() -> None:
        clock, rng = Clock(), random.Random(seed)
        turnstile = Turnstile(8, turn_s=1.0, clock=clock)
        waits: list[float] = []
        running: list[tuple[float, str]] = []

        async def ask(adapter: str) -> None:
            asked = clock.now
            await turnstile.enter(adapter)
            waits.append(clock.now - asked)
            running.append((clock.now + rng.uniform(0.1, 0.5), adapter))

        tasks = set()
        for _ in range(600):  # steps of 50 ms
            clock.now += 0.05
            names = [f"hot-{rng.randrange(8)}"] * 4 + [f"cold-{rng.randrange(8)}"]
            tasks |= {asyncio.create_task(ask(name)) for name in names if len(tasks) - len(waits) < 64}
            await settle()
            for done in [item for item in running if item[0] <= clock.now]:
                running.remove(done)
                turnstile.leave(done[1])
            await settle()
            assert turnstile.active <= 8
        assert len(waits) > 500
        # Two rounds of turns at most, each of its time and the longest request that runs at its end.
        assert max(waits) <= 2 * (1.0 + 0.5 + 0.1)
        for task in tasks:
            task.cancel()

    asyncio.run(run())
