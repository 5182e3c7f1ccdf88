"""The client against a tiny OpenAI-like server on a real socket that streams with known delays."""

from __future__ import annotations

import re
import time

import pytest
from fake_server import FakeServer

from hydraserve.bench.client import drive, parse_stream
from hydraserve.bench.stats import run_metrics
from hydraserve.bench.workload import Load, Request

FIRST_S, NEXT_S = 0.4, 0.05
# How late a stamp may be on a busy machine. FIRST_S is larger, so no confusion of the two delays passes.
LATE_S = 0.3


@pytest.fixture
def fake(fake_server: FakeServer) -> FakeServer:
    fake_server.first_s, fake_server.next_s = FIRST_S, NEXT_S
    return fake_server


def request(model: str = "one", tokens: int = 5, at: float = 0.0) -> Request:
    return Request(model, (1, 2, 3), tokens, at)


def test_one_request_is_timed_token_by_token(fake: FakeServer) -> None:
    (record,) = drive(fake.url, [request()], Load(concurrency=1))
    assert record.error is None
    assert [count for _, count in record.tokens] == [1, 2, 3, 4, 5]
    assert record.prompt_tokens == 3
    late = [got - sent for (got, _), sent in zip(record.tokens, fake.written[0], strict=True)]
    assert min(late) >= 0
    assert max(late) < LATE_S
    metrics = run_metrics([record])
    assert metrics["ttft_ms.p50"] == pytest.approx(1e3 * (FIRST_S + LATE_S / 2), abs=1e3 * LATE_S / 2)
    tpot = 1e3 * (fake.written[0][-1] - fake.written[0][0]) / 4
    assert metrics["tpot_ms.p50"] == pytest.approx(tpot, abs=1e3 * LATE_S / 4)
    assert metrics["itl_ms.mean"] == pytest.approx(metrics["tpot_ms.p50"])


def test_the_request_is_what_a_fixed_length_measurement_needs(fake: FakeServer) -> None:
    drive(fake.url, [request("name", 2)], Load(concurrency=1))
    (body,) = fake.bodies
    assert body["model"] == "name"
    assert body["prompt"] == [1, 2, 3]
    assert body["max_tokens"] == 2
    assert body["ignore_eos"] is True
    assert body["temperature"] == 0


def test_tokens_are_counted_not_chunks(fake: FakeServer) -> None:
    (record,) = drive(fake.url, [request("two", 6)], Load(concurrency=1))
    assert [count for _, count in record.tokens] == [2, 4, 6]
    assert run_metrics([record])["output_tokens"] == 6


def test_closed_loop_keeps_exactly_its_concurrency(fake: FakeServer) -> None:
    done: list[None] = []
    records = drive(fake.url, [request(tokens=2) for _ in range(6)], Load(concurrency=3), lambda: done.append(None))
    assert fake.most == 3
    assert len(records) == len(done) == 6
    ends, starts = sorted(r.end for r in records), sorted(r.start for r in records)
    assert starts[3] >= ends[0], "the fourth request waits for the first answer"


def test_open_loop_sends_at_its_times_whether_or_not_answers_come(fake: FakeServer) -> None:
    records = drive(fake.url, [request(tokens=2, at=at) for at in (0.0, 0.1, 0.2)], Load(rate=10.0))
    first = records[0].start
    for record, at in zip(records, (0.0, 0.1, 0.2), strict=True):
        assert record.start - first == pytest.approx(at), "when it was due"
        assert record.lag is not None
        assert 0 <= record.lag < LATE_S
    assert fake.most == 3


def test_a_late_client_does_not_flatter_the_server(fake: FakeServer) -> None:
    """The first answer keeps the client busy until long after the second request was due."""
    busy_s = 1.0

    def busy() -> None:
        begin = time.perf_counter()
        while time.perf_counter() - begin < busy_s:
            pass

    fake.first_s = 0.05
    early, late = drive(fake.url, [request(tokens=1), request(tokens=1, at=0.5)], Load(rate=2.0), busy)
    assert late.start - early.start == pytest.approx(0.5)
    assert late.lag is not None
    assert late.lag > 0.3
    assert late.ttft > late.lag + fake.first_s
    assert run_metrics([early, late])["send_lag_ms.max"] == pytest.approx(1e3 * late.lag)


def test_a_closed_loop_has_no_lag(fake: FakeServer) -> None:
    records = drive(fake.url, [request(tokens=1)], Load(concurrency=1))
    assert "send_lag_ms.max" not in run_metrics(records)


@pytest.mark.parametrize(
    ("model", "error"),
    [("missing", "HTTP 404.*no such model"), ("breaks", "broke off"), ("error", "engine died")],
)
def test_a_failed_request_is_told_and_the_others_go_on(fake: FakeServer, model: str, error: str) -> None:
    failed, good = drive(fake.url, [request(model, 2), request("one", 2)], Load(concurrency=2))
    assert good.error is None
    assert good.output_tokens == 2
    assert failed.error is not None
    assert re.search(error, failed.error)


def test_a_server_that_is_not_there_is_an_error_of_each_request() -> None:
    records = drive("http://127.0.0.1:9", [request(), request()], Load(concurrency=2))
    assert all("Connect" in str(record.error) for record in records)


def test_a_stream_without_counts_is_refused() -> None:
    line = b'data: {"choices": [{"text": "x"}]}\n'
    with pytest.raises(ValueError, match="continuous_usage_stats"):
        parse_stream([(0.0, line), (0.0, b"data: [DONE]\n")])


def test_a_stream_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        parse_stream([(0.0, b"data: [DONE]\n")])
