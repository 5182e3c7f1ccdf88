"""Counting requests: a limit, a pace for those who come too late, and an end that waits."""

from __future__ import annotations

import threading

import pytest

from hydraserve.errors import BusyError
from hydraserve.server.traffic import Traffic


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_requests_beyond_the_limit_are_refused_until_one_ends() -> None:
    traffic = Traffic(limit=2)
    with traffic.request():
        with traffic.request(), pytest.raises(BusyError, match="2 requests under way"), traffic.request():
            pass
        traffic.refuse()
        assert traffic.running == 1
    assert traffic.running == 0


def test_a_request_that_fails_is_counted_out() -> None:
    traffic = Traffic(limit=1)
    with pytest.raises(ZeroDivisionError), traffic.request():
        raise ZeroDivisionError
    assert traffic.running == 0


def test_the_wait_is_as_long_as_the_queue_takes_at_the_pace_of_late() -> None:
    clock = Clock()
    traffic = Traffic(limit=8, clock=clock)
    for _ in range(5):  # one answer in 2 s
        with traffic.request():
            clock.now += 2
    requests = [traffic.request() for _ in range(8)]
    for request in requests:
        request.__enter__()
    with pytest.raises(BusyError) as caught:
        traffic.refuse()
    assert caught.value.retry_after == 16
    clock.now += 10_000  # nothing was answered for hours: a client is still told a time that it can wait
    with pytest.raises(BusyError) as caught:
        traffic.refuse()
    assert caught.value.retry_after == 60


def test_draining_takes_nothing_more_and_waits_for_what_runs() -> None:
    traffic = Traffic(limit=4)
    with traffic.request():
        assert traffic.drain(0.01) is False
        with pytest.raises(BusyError, match="ending"), traffic.request():
            pass
        drained: list[bool] = []
        waiting = threading.Thread(target=lambda: drained.append(traffic.drain(30)))
        waiting.start()
    waiting.join(30)
    assert drained == [True]
