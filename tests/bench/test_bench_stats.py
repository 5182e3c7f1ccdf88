"""The arithmetic of the benchmark, on streams made by hand."""

from __future__ import annotations

import pytest

from hydraserve.bench.stats import (
    RequestRecord,
    Slo,
    distribution,
    over_repeats,
    paired_ratio,
    run_metrics,
    spread,
)
from hydraserve.errors import ConfigError


def record(start: float, *tokens: tuple[float, int], error: str | None = None) -> RequestRecord:
    return RequestRecord("m", start, tokens, 10, error)


# Sent at 100 s; tokens after 0.5, 0.6 and 0.9 s, where two came together.
STREAM = record(100.0, (100.5, 1), (100.6, 2), (100.9, 4))


def test_times_of_one_stream() -> None:
    assert STREAM.output_tokens == 4
    assert STREAM.ttft == pytest.approx(0.5)
    assert STREAM.tpot == pytest.approx(0.4 / 3)
    assert STREAM.latency == pytest.approx(0.9)
    assert STREAM.gaps() == pytest.approx([0.1, 0.3, 0.0])


def test_tokens_that_come_with_the_first_are_not_in_tpot() -> None:
    assert record(0.0, (1.0, 3), (2.0, 5)).tpot == pytest.approx(0.5)
    assert record(0.0, (1.0, 3)).tpot is None
    assert record(0.0, (1.0, 3)).gaps() == []


def test_a_run_of_three_requests_one_of_which_failed() -> None:
    second = record(100.2, (100.4, 1), (102.2, 19))
    failed = record(100.0, error="HTTP 500")
    metrics = run_metrics([STREAM, second, failed], Slo(ttft=400))
    assert metrics["requests"] == 3
    assert metrics["failed"] == 1
    assert metrics["output_tokens"] == 23
    assert metrics["prompt_tokens"] == 20
    assert metrics["duration_s"] == pytest.approx(2.2)
    assert metrics["output_tokens_per_s"] == pytest.approx(23 / 2.2)
    assert metrics["requests_per_s"] == pytest.approx(2 / 2.2)
    assert metrics["goodput_per_s"] == pytest.approx(1 / 2.2)
    assert metrics["ttft_ms.p50"] == pytest.approx(350)
    assert metrics["tpot_ms.mean"] == pytest.approx((400 / 3 + 100) / 2)
    assert metrics["e2e_ms.p99"] == pytest.approx(900 + 0.99 * 1100)
    # 3 gaps of the first stream, 18 of the second: one of 1800 ms, one of 300, one of 100, and zeros
    assert metrics["itl_ms.mean"] == pytest.approx(2200 / 21)
    assert metrics["itl_ms.p50"] == 0.0


def test_a_run_without_answers_has_no_times() -> None:
    metrics = run_metrics([record(0.0, error="refused")])
    assert metrics["failed"] == 1
    assert metrics["output_tokens"] == 0
    assert metrics["output_tokens_per_s"] is None
    assert metrics["ttft_ms.p50"] is None


def test_percentiles_interpolate() -> None:
    values = distribution("x", [float(n) for n in range(1, 101)])
    assert values == {
        "x.mean": 50.5,
        "x.p50": pytest.approx(50.5),
        "x.p90": pytest.approx(90.1),
        "x.p99": pytest.approx(99.01),
    }


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(ttft=500), True),
        (Slo(ttft=499), False),
        (Slo(tpot=134), True),
        (Slo(tpot=133), False),
        (Slo(e2e=901), True),
        (Slo(ttft=600, e2e=899), False),
        (Slo(), True),
    ],
)
def test_slo(slo: Slo, met: bool) -> None:
    early = RequestRecord("m", 0.0, ((0.5, 1), (0.6, 2), (0.9, 4)))
    assert slo.met_by(early) is met


def test_slo_of_a_failed_and_of_a_one_token_request() -> None:
    assert not Slo().met_by(record(0.0, error="lost"))
    assert Slo(tpot=1).met_by(record(0.0, (5.0, 1)))


def test_slo_is_parsed() -> None:
    assert Slo.parse("ttft=500,tpot=50") == Slo(ttft=500, tpot=50)
    assert Slo.parse("e2e=2e3") == Slo(e2e=2000)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=fast", "latency=5", "ttft=0", "ttft=-1", "ttft=1=2"])
def test_bad_slo_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        Slo.parse(text)


def test_spread_is_median_and_range_of_what_is_there() -> None:
    assert spread([3.0, None, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([1.0, 2.0]) == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert spread([None, float("nan")]) is None


def test_over_repeats_leaves_out_what_no_run_has() -> None:
    runs = [{"a": 1.0, "b": None}, {"a": 3.0, "b": None, "c": 5.0}]
    assert over_repeats(runs) == {
        "a": {"median": 2.0, "min": 1.0, "max": 3.0},
        "c": {"median": 5.0, "min": 5.0, "max": 5.0},
    }


def test_ratios_are_taken_repeat_by_repeat() -> None:
    # A machine that slows down threefold: the medians' ratio would be 1.1 / 3; each pair says 1.1.
    base = [{"t": 1.0}, {"t": 2.0}, {"t": 3.0}]
    runs = [{"t": 1.1}, {"t": 2.2}, {"t": 3.3}]
    ratio = paired_ratio(runs, base, "t")
    assert ratio is not None
    assert list(ratio.values()) == pytest.approx([1.1, 1.1, 1.1])


def test_a_ratio_needs_both_sides() -> None:
    # A run that was stopped in its second repeat, and a baseline that measured nothing.
    assert paired_ratio([{"t": 2.0}], [{"t": 1.0}, {"t": 9.0}], "t") == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert paired_ratio([{"t": 2.0}], [{"t": None}], "t") is None
    assert paired_ratio([{"t": 2.0}], [{"t": 0.0}], "t") is None
