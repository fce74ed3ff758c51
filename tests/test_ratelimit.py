"""Rates and concurrency, against a clock that the tests turn."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.ratelimit import Bucket, Limiter, Limits, duration

MINUTE_MS = 60_000
RATES = st.integers(1, 100_000)
WAITS_MS = st.lists(st.integers(0, 90_000), max_size=60)


class Clock:
    def __init__(self):
        self.ns = 5

    def __call__(self):
        return self.ns

    def advance(self, ms):
        self.ns += ms * 1_000_000


@given(RATES, WAITS_MS)
def test_never_more_than_the_rate(per_minute, waits):
    """Of any stretch: what was saved up, a minute's at most, and what the time brought. And never less either."""
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    level = Fraction(per_minute)
    for wait in waits:
        clock.advance(wait)
        level = min(Fraction(per_minute), level + Fraction(wait * per_minute, MINUTE_MS))
        assert bucket.remaining() == int(level)
        passed = bucket.take()
        assert passed == (level >= 1)
        level -= passed


@given(RATES, WAITS_MS)
def test_what_is_promised_holds(per_minute, waits):
    """After `next_ms` a request passes, and not a millisecond before; after `reset_ms` all of them do."""
    clock = Clock()
    bucket = Bucket(min(per_minute, 500), clock)
    for wait in waits:
        clock.advance(wait)
        while bucket.take():
            pass
        promised = bucket.next_ms()
        assert promised > 0
        clock.advance(promised - 1)
        assert not bucket.take()
        clock.advance(1)
        assert bucket.next_ms() == 0
        assert bucket.take()
    clock.advance(bucket.reset_ms())
    assert (bucket.remaining(), bucket.reset_ms()) == (bucket.per_minute, 0)


def test_a_clock_that_goes_back_takes_and_gives_nothing():
    clock = Clock()
    bucket = Bucket(60, clock)
    for _ in range(60):
        assert bucket.take()
    clock.advance(-10_000)
    assert not bucket.take()
    clock.advance(10_000)
    assert not bucket.take()
    clock.advance(1000)
    assert bucket.take()


@given(
    st.integers(0, 5),
    st.integers(0, 20),
    st.lists(st.sampled_from(["begin", "end", "wait", "change"]), max_size=100),
)
def test_a_limiter_holds_both_limits_and_loses_no_place(concurrency, per_minute, actions):
    clock = Clock()
    limiter = Limiter(Limits(per_minute, concurrency), clock)
    running = passed = 0
    for action in actions:
        if action == "wait":
            clock.advance(500)
        elif action == "end":
            if running:
                running -= 1
                limiter.end()
        elif action == "change":
            limiter.change(Limits(per_minute, concurrency))  # the same: nothing is given anew
        else:
            refusal = limiter.begin()
            if refusal is None:
                running, passed = running + 1, passed + 1
            else:
                assert (concurrency and running >= concurrency) or per_minute
                assert refusal.wait_ms >= 1
        assert limiter.running == running
        assert not concurrency or running <= concurrency
    if per_minute:
        minutes = (clock.ns - 5) / 60e9
        assert passed <= per_minute * (1 + minutes)


def test_one_refused_for_concurrency_does_not_count_for_the_rate():
    limiter = Limiter(Limits(2, 1), Clock())
    assert limiter.begin() is None
    for _ in range(5):
        assert "at a time" in limiter.begin().message
    limiter.end()
    assert limiter.begin() is None
    limiter.end()
    assert "a minute" in limiter.begin().message


def test_limits_that_change_while_requests_run():
    clock = Clock()
    limiter = Limiter(Limits(0, 2), clock)
    assert limiter.begin() is None
    assert limiter.begin() is None
    limiter.change(Limits(60, 1))
    assert limiter.running == 2
    limiter.end()
    assert limiter.begin()  # one runs still
    limiter.end()
    assert limiter.begin() is None
    assert dict(limiter.headers())[b"x-ratelimit-remaining-requests"] == b"59"
    limiter.change(Limits())
    assert limiter.headers() == []
    assert limiter.begin() is None


def test_the_headers():
    clock = Clock()
    limiter = Limiter(Limits(10), clock)
    limiter.begin()
    assert limiter.headers() == [
        (b"x-ratelimit-limit-requests", b"10"),
        (b"x-ratelimit-remaining-requests", b"9"),
        (b"x-ratelimit-reset-requests", b"6s"),
    ]


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0s"),
        (1, "1ms"),
        (20, "20ms"),
        (999, "999ms"),
        (1000, "1s"),
        (1001, "2s"),
        (59_001, "1m0s"),
        (60_000, "1m0s"),
        (360_000, "6m0s"),
        (3_600_000, "1h0m0s"),
        (3_661_000, "1h1m1s"),
    ],
)
def test_durations_as_openai_writes_them(ms, text):
    """`x-ratelimit-reset-requests: 1s`, `x-ratelimit-reset-tokens: 6m0s` (OpenAI, Rate limits in headers)."""
    assert duration(ms) == text
