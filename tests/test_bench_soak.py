"""The soak's plan can be had again, and its judge lets nothing pass that a client should not see."""

from __future__ import annotations

import json
import math
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bench import processes
from bench.client import Result
from bench.echoes import Served
from bench.soak import asks, judge
from bench.soak.asks import Ask, Echo, Echoed
from bench.soak.faults import Faults
from bench.soak.held import Held, leaks
from bench.soak.judge import Judged, Tally, Window
from bench.soak.plan import DEAF, HOSTILE, KILL, LEAVERS, STAGES, STOP, TRITON, Fault, plan
from tests.product import wait_for

ASK = Ask("a", "/completions", {"stream": True}, 10.0, "one two one", 3)
HURRIED = Ask("a", "/completions", {"stream": True}, 0.5, "one two one two", 4, hurried=True)
ECHOES = (Echo("a", 100), Echo("b", 0))


def result(error=None, text="", **fields) -> Result:
    return Result(error=error, text=[text[:4], text[4:]], **fields)


def whole(text="one two one", **fields) -> Result:
    return result(**{"text": text, "tokens": 3, "finish_reason": "length", "status": 200, "done": True, **fields})


# The plan


def test_a_seed_is_a_plan_and_another_seed_another():
    assert plan(1, 600, 30, ["a", "b"]) == plan(1, 600, 30, ["a", "b"])
    assert plan(1, 600, 30, ["a", "b"]) != plan(2, 600, 30, ["a", "b"])


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_has_a_fault_of_every_kind_in_time(seed):
    faults = plan(seed, 600, 30, ["a", "b"])
    assert len(faults) == 20
    assert all(30 * number < fault.at < 30 * (number + 1) for number, fault in enumerate(faults))
    assert faults[-1].at <= 600 - 15  # there is time to mend it
    assert {fault.kind for fault in faults} == {KILL, STOP, TRITON, LEAVERS, DEAF, HOSTILE}
    for fault in faults:
        staged = fault.kind in (KILL, STOP)
        assert (fault.pipeline in ("a", "b")) == (fault.stage in STAGES) == staged
        assert fault.resumed_after is None or (fault.kind == STOP and 1 <= fault.resumed_after <= 4)
        assert str(fault)


def test_a_short_soak_has_no_fault_that_could_not_be_mended():
    assert plan(1, 20, 30, ["a"]) == []
    assert len(plan(1, 45, 30, ["a"])) == 1


def test_whom_a_fault_touches():
    assert Fault(0, KILL, "a", "generate").touches("a")
    assert not Fault(0, KILL, "a", "generate").touches("b")
    assert Fault(0, TRITON).touches("b")
    assert not any(Fault(0, kind).touches("a") for kind in (LEAVERS, DEAF, HOSTILE))


# The requests


def drawn(seed: int, count: int) -> list[Ask]:
    dice = random.Random(seed)
    return [
        asks.draw(dice, ECHOES, lambda prompt, tokens: prompt, lambda messages, tokens: messages, json.dumps)
        for _ in range(count)
    ]


def test_requests_are_drawn_from_the_seed_and_of_every_kind():
    assert drawn(1, 50) == drawn(1, 50) != drawn(2, 50)
    every = drawn(3, 500)
    seen = {(ask.pipeline, ask.path, ask.stream, ask.body.get("priority", 0)) for ask in every}
    assert len(seen) == 16
    hurried = [ask for ask in every if ask.hurried]
    assert {ask.pipeline for ask in hurried} == {"a"}
    assert all(ask.tokens / 100 > 2 * ask.deadline_s for ask in hurried)  # it cannot be done in time
    assert all(ask.headers == {"x-request-timeout-ms": str(round(ask.deadline_s * 1000))} for ask in every)


def test_what_an_echo_must_answer(smollm2_home):
    echoed = Echoed(smollm2_home)
    assert echoed.completion("a b", 5) == "a ba ba"
    chat = echoed.chat('[{"role": "user", "content": "Hi"}]', 500)
    assert "user\nHi" in chat
    assert "<|im_start|>" not in chat


# The judge


@pytest.mark.parametrize(
    ("ask", "told", "outcome"),
    [
        (ASK, whole(), judge.EXACT),
        (ASK, whole("one two two"), judge.WRONG),
        (ASK, whole("one two"), judge.WRONG),  # short, and said to be whole
        (ASK, whole("one two one two"), judge.WRONG),
        (ASK, whole(tokens=4), judge.WRONG),
        (ASK, whole(finish_reason=None), judge.WRONG),
        (ASK, result("http 503", status=503, headers={"retry-after": "2"}), judge.REFUSED),
        (ASK, result("http 429", status=429, headers={"retry-after": "1"}), judge.REFUSED),
        (ASK, result("http 503", status=503), judge.BROKEN),  # it does not say when to come again
        (ASK, result("http 500", status=500), judge.BROKEN),
        (ASK, result("http 400", status=400), judge.BROKEN),
        (ASK, result("http 504", status=504), judge.FAILED),
        (ASK, result("error event: unavailable", "one", status=200), judge.FAILED),
        (ASK, result("error event: unavailable", "two", status=200), judge.WRONG),
        (ASK, result("error event: unavailable", "one", status=200, done=True), judge.BROKEN),
        (ASK, result("closed early", "one", status=200), judge.BROKEN),
        (ASK, result("no [DONE]", "one two one", status=200), judge.BROKEN),
        (ASK, result("connect: ConnectionRefusedError"), judge.BROKEN),
        (ASK, result("timeout", "one", status=200), judge.HANG),
        (HURRIED, result("http 504", status=504), judge.TIMED_OUT),
        (HURRIED, result("error event: timeout", "one", status=200), judge.TIMED_OUT),
        (HURRIED, result("error event: timeout", "no", status=200), judge.WRONG),
        (HURRIED, result("error event: unavailable", status=200), judge.FAILED),
    ],
)
def test_what_became_of_a_request(ask, told, outcome):
    assert judge.outcome(ask, told) == outcome


def test_an_answer_that_nobody_knows_must_be_whole():
    unknown = Ask("m", "/chat/completions", {"stream": False}, 10.0, None, 0)
    assert judge.outcome(unknown, whole("whatever")) == judge.EXACT
    assert judge.outcome(unknown, whole("whatever", finish_reason=None)) == judge.WRONG


def judged(began: float, ended: float, *windows: Window, pipeline: str = "a") -> Judged:
    ask = Ask(pipeline, "/completions", {"stream": True}, 2.0, "", 0)
    return judge.judge(ask, Result(started=began, ended=ended), judge.EXACT, windows)


def test_a_request_is_on_a_fault_if_their_times_meet():
    window = Window(Fault(0, KILL, "a", "generate"), 10.0, {"a": 15.0})
    assert not judged(8, 9.9, window).on_fault
    assert judged(8, 10.1, window).on_fault
    assert judged(12, 13, window).on_fault
    assert judged(14.9, 20, window).on_fault
    assert not judged(15.1, 20, window).on_fault
    assert not judged(12, 13, window, pipeline="b").on_fault
    assert judged(900, 901, Window(Fault(0, KILL, "a", "generate"), 10.0)).on_fault  # it never came back
    death = Window(Fault(0, TRITON), 10.0, {"a": 15.0, "b": 20.0})
    assert not judged(16, 17, death).on_fault
    assert judged(16, 17, death, pipeline="b").on_fault
    assert not judged(10, 11, Window(Fault(0, LEAVERS), 10.0)).on_fault  # what clients do is no excuse


def test_late_is_a_second_after_the_deadline():
    assert not judged(0, 2.9).late
    assert judged(0, 3.1).late


def test_the_goals():
    tally = Tally()
    for _ in range(10_000):
        tally.add(Judged(judge.EXACT, on_fault=False, late=False))
    tally.add(Judged(judge.TIMED_OUT, on_fault=False, late=False))
    tally.add(Judged(judge.FAILED, on_fault=True, late=False))
    tally.add(Judged(judge.REFUSED, on_fault=False, late=False))
    mended = Window(Fault(0, TRITON), 10.0, {"a": 12.0, "b": 13.0})
    assert mended.recovery_s == {"a": 2.0, "b": 3.0}
    assert judge.missed(tally, [mended], ["a", "b"], []) == []  # one in ten thousand may fail

    assert len(judge.missed(tally, [Window(Fault(0, TRITON), 10.0, {"a": 12.0})], ["a", "b"], ["a leak"])) == 2
    tally.add(Judged(judge.WRONG, on_fault=True, late=True))
    assert judge.missed(tally, [], [], []) == ["1 past their deadline", "1 wrong"]
    tally.add(Judged(judge.HANG, on_fault=False, late=False))
    assert [goal.split()[0] for goal in judge.missed(tally, [], [], [])] == ["99.9800%", "1", "1", "1"]


def test_a_soak_without_requests_has_not_passed():
    assert math.isnan(Tally().success_off_fault)
    assert judge.missed(Tally(), [], [], []) != []


# The faults


def state(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_signal_goes_to_the_stage_that_is_named_and_is_taken_back():
    """A process that looks like a stub's; the tree it is looked for in is that one's alone."""
    command = ["triton_python_backend_stub", "-c", "while sleep 1; do true; done", "/somewhere/a-generate/1/model.py"]
    stop = Fault(0, STOP, "a", "generate")
    with subprocess.Popen(command, executable="/bin/sh") as stub:
        faults = Faults(Served("http://127.0.0.1:9", "", stub.pid, Path()), ECHOES, 5, seed=0)
        try:
            wait_for(lambda: processes.process_name(stub.pid) == "stub a-generate", 10)
            assert not faults.strike(Fault(0, KILL, "a", "preprocess"))
            assert not faults.strike(Fault(0, TRITON))
            assert faults.strike(stop)
            wait_for(lambda: state(stub) == "T", 10)
            assert faults.resume(stop)
            wait_for(lambda: state(stub) != "T", 10)
            assert faults.strike(Fault(1, KILL, "a", "generate"))
            assert stub.wait(10) == -9
            assert not faults.resume(stop)  # it has gone, and whoever has its number now is left alone
            faults.forget(stop)
        finally:
            stub.kill()


# What is held


def test_what_is_left_behind():
    before = Held({"gateway.cli": 1, "stub a": 4}, 0, 12, 30, {"gateway.cli": 80})
    assert leaks(before, before, 0) == []
    assert leaks(before, Held({"gateway.cli": 1, "stub a": 4}, 0, 12, 40, {"gateway.cli": 99}), 0) == []
    worse = Held({"gateway.cli": 1, "stub a": 5, "stub b": 1}, 1, 13, 60, {})
    assert leaks(before, replace(before, zombies=2), ended=2) == []
    assert leaks(before, worse, ended=0) == [
        "5 processes stub a instead of 4",
        "1 processes stub b instead of 0",
        "1 zombies of 0 processes that were ended",
        "13 segments of shared memory instead of 12",
        "60 descriptors of the gateway instead of 30",
    ]
