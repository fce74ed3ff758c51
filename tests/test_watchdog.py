"""The watchdog names the stage that hangs, once, and never one that works."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies

from gateway.watchdog import Patience, Stall, Watchdog

PATIENCE = Patience(silent_s=5, answer_s=2, token_gap_s=10, accept_s=30, look_s=2)
IDLE = {"running": 0, "waiting": 0, "steps": 7, "output_tokens": 40, "finished": 1}


def busy(steps: int, running: int = 1, waiting: int = 0) -> dict[str, float]:
    return {"running": running, "waiting": waiting, "steps": steps}


class Hours:
    """A watchdog and the seconds that pass for it, in looks of half a second."""

    def __init__(self, *pipelines: str, patience: Patience = PATIENCE) -> None:
        self.now = 1000.0
        self.dog = Watchdog(patience)
        self.asked: list[tuple[str, str]] = []
        for pipeline in pipelines:
            self.dog.watch(pipeline, self.now)

    def passing(self, seconds, *, heard=(), counters=None, answers=()) -> list[Stall]:
        """Meanwhile these lanes bring heartbeats, and these stages answer when they are asked."""
        stalls = []
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            for pipeline in heard:
                self.dog.heard(pipeline, self.now, counters)
            asked = self.dog.to_ask(self.now)
            self.asked += asked
            for pipeline, stage in asked:
                if stage in answers:
                    self.dog.answered(pipeline, stage)
            stalls += self.dog.stalled(self.now)
        return stalls


@pytest.mark.parametrize(
    ("answers", "stage"),
    [
        ((), "generate"),
        (("postprocess",), "generate"),
        (("generate",), "postprocess"),
        (("generate", "postprocess"), "orchestrator"),
    ],
)
def test_of_a_silent_lane_the_stage_that_does_not_answer(answers, stage):
    hours = Hours("a", "b")
    assert hours.passing(60, heard=("a", "b"), counters=IDLE) == []
    assert hours.asked == []
    (stall,) = hours.passing(5, heard=("b",), answers=answers)
    assert (stall.pipeline, stall.stage) == ("a", stage)
    assert "no heartbeat for 5.0 s" in stall.reason
    assert hours.asked == [("a", "generate"), ("a", "postprocess")]  # once


def test_a_lane_that_never_opens_is_silent_too():
    hours = Hours("a")
    assert hours.passing(4.5) == []
    assert [stall.stage for stall in hours.passing(0.5)] == ["generate"]


def test_a_lane_that_was_silent_for_a_while_is_asked_anew_the_next_time():
    hours = Hours("a")
    assert hours.passing(4, answers=("generate", "postprocess")) == []
    assert hours.passing(1, heard=("a",)) == []
    (stall,) = hours.passing(5)  # what was answered then says nothing now
    assert stall.stage == "generate"
    assert len(hours.asked) == 4


def test_what_was_asked_has_its_time_to_answer():
    """A look that comes late must not find the stages asked and silent in the same moment."""
    dog = Watchdog(Patience(look_s=60))
    dog.watch("a", 0.0)
    assert dog.stalled(0.0) == []
    assert len(dog.to_ask(20.0)) == 2
    assert dog.stalled(20.0) == dog.stalled(21.9) == []
    assert [stall.stage for stall in dog.stalled(22.0)] == ["generate"]


def test_an_engine_that_makes_no_step():
    hours = Hours("a")
    hours.passing(60, heard=("a",), counters=busy(3, running=0))  # idle: nothing is to be done
    assert hours.passing(9.5, heard=("a",), counters=busy(3)) == []
    (stall,) = hours.passing(1, heard=("a",), counters=busy(3))
    assert (stall.pipeline, stall.stage) == ("a", "generate")
    assert "no step for 10.0 s" in stall.reason


def test_an_engine_that_admits_nobody():
    hours = Hours("a")
    assert [stall.stage for stall in hours.passing(11, heard=("a",), counters=busy(0, 0, waiting=3))] == ["generate"]


@pytest.mark.parametrize("name", ["steps", "output_tokens", "finished", "cancelled"])
def test_an_engine_that_is_slow_but_moves(name):
    hours = Hours("a")
    for count in range(20):
        assert hours.passing(9, heard=("a",), counters={**busy(0), name: count}) == []


def test_no_gap_is_none():
    hours = Hours("a", patience=Patience(token_gap_s=0))
    assert hours.passing(3600, heard=("a",), counters=busy(3)) == []


def test_a_heartbeat_without_counters_says_nothing_of_the_engine():
    hours = Hours("a")
    hours.passing(1, heard=("a",), counters=busy(3))
    assert [stall.stage for stall in hours.passing(12, heard=("a",))] == ["generate"]


@pytest.mark.parametrize(("answers", "stage"), [((), "preprocess"), (("preprocess",), "orchestrator")])
def test_of_those_that_take_nothing_the_one_that_does_not_answer(answers, stage):
    """An orchestrator's heartbeats come from another thread than the one that takes requests."""
    hours = Hours("a")
    hours.dog.submitted("a", "1", hours.now)
    assert hours.passing(29.5, heard=("a",), answers=answers) == []
    (stall,) = hours.passing(1, heard=("a",), answers=answers)
    assert (stall.pipeline, stall.stage) == ("a", stage)
    assert "no request was taken for 30.0 s" in stall.reason
    assert hours.asked == [("a", "preprocess")]


def test_what_preprocess_answered_then_says_nothing_now():
    hours = Hours("a")
    hours.dog.submitted("a", "1", hours.now)
    assert hours.passing(29, heard=("a",), answers=("preprocess",)) == []
    hours.dog.ended("a", "1")
    hours.dog.submitted("a", "2", hours.now)
    assert [stall.stage for stall in hours.passing(30, heard=("a",))] == ["preprocess"]


def test_one_that_takes_others_is_none():
    """A request that is stuck alone is its own timeout's, and others would pay for a replacement."""
    hours = Hours("a")
    hours.dog.submitted("a", "stuck", hours.now)
    for number in range(10):
        hours.dog.submitted("a", str(number), hours.now)
        hours.dog.taken("a", str(number), hours.now)
        assert hours.passing(20, heard=("a",)) == []
    assert len(hours.passing(10, heard=("a",))) == 1


def test_who_has_left_waits_for_nobody():
    hours = Hours("a")
    hours.dog.submitted("a", "1", hours.now)
    hours.passing(20, heard=("a",))
    hours.dog.ended("a", "1")
    hours.dog.ended("a", "1")
    assert hours.passing(20, heard=("a",)) == []


def test_each_is_reported_once_until_it_is_watched_again():
    hours = Hours("a")
    assert len(hours.passing(60)) == 1
    hours.dog.heard("a", hours.now, busy(3))
    hours.dog.submitted("a", "1", hours.now)
    assert hours.passing(60) == []
    hours.dog.watch("a", hours.now)
    assert len(hours.passing(60)) == 1


def test_one_that_is_repaired_is_not_watched_and_begins_anew():
    hours = Hours("a")
    hours.dog.submitted("a", "of the one before", hours.now)
    hours.passing(4, heard=("a",), counters=busy(3))
    hours.dog.forget("a")
    assert hours.passing(600) == []
    hours.dog.watch("a", hours.now)
    assert hours.passing(600, heard=("a",), counters=IDLE) == []


def test_who_was_held_up_itself_has_not_listened():
    """A gateway that was stopped, or on a laptop that slept, finds every lane silent: it listens first."""
    hours = Hours("a")
    hours.dog.submitted("a", "1", hours.now)
    hours.passing(1, heard=("a",), counters=busy(3))
    hours.now += 3600
    assert hours.dog.stalled(hours.now) == hours.dog.to_ask(hours.now) == []
    assert hours.passing(6, heard=("a",), counters=busy(3)) == []
    assert len(hours.passing(3, heard=("a",), counters=busy(3))) == 1  # and hardly later than it would have


EVENTS = strategies.lists(
    strategies.tuples(
        strategies.sampled_from(["heard", "step", "submit", "take", "end", "ask", "forget", "watch", "none"]),
        strategies.sampled_from(["a", "b"]),
        strategies.floats(0, 1.5),
    ),
    max_size=200,
)


@settings(max_examples=200, deadline=None)
@given(EVENTS)
def test_whatever_happens_one_that_works_is_never_reported_and_one_that_hangs_always_is(events):
    """`b` does all it should in every turn; `a` as it comes, and at the end nothing at all."""
    dog, now = Watchdog(PATIENCE), 0.0
    dog.watch("a", now)
    dog.watch("b", now)
    steps = 0
    for event, pipeline, seconds in events:
        now += seconds
        steps += 1
        dog.heard("b", now, busy(steps))
        if event == "heard":
            dog.heard("a", now, busy(steps // 50))
        elif event == "step":
            dog.heard("a", now, busy(steps))
        elif event == "submit":
            dog.submitted(pipeline, str(steps), now)
        elif event in ("take", "end"):
            dog.ended(pipeline, str(steps - 1)) if event == "end" else dog.taken(pipeline, str(steps - 1), now)
        elif event == "ask":
            dog.to_ask(now)
        elif event == "forget":
            dog.forget("a")
        elif event == "watch":
            dog.watch("a", now)
        dog.submitted("b", f"b{steps}", now)
        dog.taken("b", f"b{steps}", now)
        for stall in dog.stalled(now):
            assert stall.pipeline == "a"
    dog.watch("a", now)
    found = []
    for _ in range(12):
        now += 0.5
        dog.heard("b", now, busy(steps := steps + 1))
        dog.to_ask(now)
        found += dog.stalled(now)
    assert [stall.pipeline for stall in found] == ["a"]
