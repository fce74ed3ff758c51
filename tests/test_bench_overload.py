"""The overload bench counts what was served in time, and names each goal that was missed."""

from __future__ import annotations

import pytest

from bench.client import Result
from bench.overload import Load, Sample, verdict
from bench.soak.asks import BATCH, INTERACTIVE

MIB = 2**20


def served(at: float, took_s: float = 0.5, priority: int = INTERACTIVE, **fields) -> Sample:
    values = {"status": 200, "tokens": 25, "finish_reason": "length", "started": at, "ended": at + took_s}
    return Sample(priority, 25, Result(**{**values, **fields}))


def refused(at: float, took_s: float = 0.002, **headers: str) -> Sample:
    headers = {"retry-after": "1", "server-timing": "total;dur=0.7", **headers}
    return Sample(BATCH, 25, Result("http 429", status=429, headers=headers, started=at, ended=at + took_s))


def load(*samples: Sample, seconds: float = 10.0, **fields) -> Load:
    return Load(list(samples), began=0.0, seconds=seconds, **fields)


PEAK = load(*(served(number / 2) for number in range(20)))


def over(*more: Sample, took_s: float = 0.5, count: int = 20, resident=(100 * MIB,) * 6, queued=(3.0,)) -> Load:
    good = [served(number / 2, took_s) for number in range(count)]
    return load(*good, *more, resident=list(resident), queued=list(queued))


def test_all_goals_reached():
    found = verdict(PEAK, over(*[refused(1.0)] * 180), max_queue=16)
    assert found["missed"] == []
    assert (found["goodput_ratio"], found["interactive_p99_ratio"], found["offered_per_s"]) == (1.0, 1.0, 20.0)
    assert (found["refused"], found["refused_without_retry_after"]) == (180, 0)
    assert found["refusal_in_gateway_ms"]["p99"] == pytest.approx(0.7)
    assert found["served_share"] == {"interactive": 1.0, "batch": 0.0}


@pytest.mark.parametrize(
    ("overload", "goal"),
    [
        (over(count=15), "goodput 0.75"),
        (over(took_s=0.8), "interactive p99 1.60"),
        (over(refused(1.0, took_s=0.02)), "p99 of refusals 20.0"),
        (over(Sample(BATCH, 25, Result("http 503", status=503, started=1, ended=1))), "1 refusals without"),
        (over(queued=(3.0, 17.0)), "17 waiting"),
        (over(queued=()), "inf waiting"),
        (over(resident=[100 * MIB] * 5 + [109 * MIB]), "the gateway grew by 9.0 MiB"),
        (over(served(1, error="closed early")), "other failures: {'closed early': 1}"),
        (over(served(1, tokens=24)), "other failures: {'wrong answer': 1}"),
    ],
)
def test_each_goal(overload, goal):
    (missed,) = verdict(PEAK, overload, max_queue=16)["missed"]
    assert missed.startswith(goal)


def test_what_ends_after_the_time_is_not_counted():
    late = load(*PEAK.samples, *(served(11.0) for _ in range(10)))
    assert late.per_s == PEAK.per_s


def test_nothing_served_is_no_success():
    found = verdict(PEAK, load(refused(1.0), queued=[16.0]), max_queue=16)
    assert [goal.split(" ")[0] for goal in found["missed"]] == ["goodput", "interactive"]
