"""The generate stage around an engine: answers, polls, cancels, an engine that breaks, and a close that tells all."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pipelines.engine import Counters, Limits, Logprob, Output, Request
from pipelines.engine.echo import EchoEngine
from pipelines.errors import StageError
from pipelines.generate import MAX_POLL_TOKENS, Answer, Generate, Poll, Row
from pipelines.images.features import Features
from pipelines.images.gate import Gate
from pipelines.sampling import Sampling
from pipelines.terms import Terms
from tests.product import wait_for

LIMITS = Limits(context=100_000, eos_ids=frozenset({0}))


def never(stop: tuple[str, ...]) -> Any:
    return lambda token_id: False


@pytest.fixture
def stage() -> Iterator[Generate]:
    stage = Generate(EchoEngine(LIMITS), stop_checker=never)
    yield stage
    stage.close()


def polled(stage: Generate, wait_s: float = 5) -> Poll:
    answers: list[Poll] = []
    stage.poll(wait_s, answers.append)
    wait_for(lambda: answers, 10)
    return answers[0]


def collect(stage: Generate, *ids: str) -> dict[str, list[Any]]:
    """Poll until every id has finished: its tokens and its finish reason."""
    found: dict[str, list[Any]] = {id: [[], ""] for id in ids}
    while not all(reason for _, reason in found.values()):
        poll = polled(stage)
        assert sum(len(row.output_ids) for row in poll.rows) <= MAX_POLL_TOKENS
        for row in poll.rows:
            found[row.id][0] += row.output_ids
            found[row.id][1] = row.finish_reason
    return found


def test_a_whole_answer(stage: Generate) -> None:
    answers: list[Answer | StageError] = []
    stage.generate([5, 6, 7], Sampling(max_tokens=5), answers.append)
    wait_for(lambda: answers, 10)
    assert answers == [Answer([5, 6, 7, 5, 6], "length")]


def test_polls_merge_all_requests_and_lose_nothing(stage: Generate) -> None:
    for number in range(20):
        stage.submit(f"r{number}", [number, number + 1], Sampling(max_tokens=300 + number))
    found = collect(stage, *(f"r{number}" for number in range(20)))
    for number in range(20):
        tokens, reason = found[f"r{number}"]
        assert reason == "length"
        assert tokens == [number + index % 2 for index in range(300 + number)]


def test_an_idle_poll_answers_empty(stage: Generate) -> None:
    assert polled(stage, wait_s=0.05).rows == []


def test_a_second_poll_answers_the_first(stage: Generate) -> None:
    """Its caller is gone, or there would not be a second one: nobody may hang."""
    first: list[Poll] = []
    stage.poll(60, first.append)
    stage.submit("a", [1], Sampling(max_tokens=1))
    collect(stage, "a") if not first else None
    wait_for(lambda: first, 10)


def test_cancel_stops_by_name_and_drops_what_is_unread(stage: Generate) -> None:
    stage.submit("a", [1, 2], Sampling(max_tokens=90_000))
    wait_for(lambda: stage.counters()["output_tokens"] > 1000, 10)
    assert stage.cancel("a") in (0, 1)  # an echo this fast may have finished
    tokens = 0
    while True:
        row = next(iter(polled(stage).rows))
        tokens += len(row.output_ids)
        if row.finish_reason:
            break
    assert tokens < 90_000
    assert stage.cancel("nobody") == 0


def test_a_running_id_is_refused() -> None:
    stage = Generate(EchoEngine(LIMITS, tokens_per_s=10), stop_checker=never)
    stage.submit("a", [1], Sampling(max_tokens=1000))
    with pytest.raises(StageError, match="running already"):
        stage.submit("a", [1], Sampling(max_tokens=1))
    stage.close()


class Scripted:
    """An engine that plays one step after another, once there is a request."""

    idle_s = 0.0
    begun = ()

    def __init__(self, *steps: list[Output]) -> None:
        self.counters = Counters()
        self.steps = list(steps)
        self.requests: list[Request] = []

    def submit(self, request: Request) -> None:
        self.requests.append(request)

    def cancel(self, request_id: str) -> None: ...

    @property
    def busy(self) -> bool:
        return bool(self.requests and self.steps)

    def step(self) -> list[Output]:
        return self.steps.pop(0) if self.busy else []


def row_of(stage: Generate) -> Row:
    (row,) = polled(stage).rows
    return row


def test_log_probabilities_stay_with_their_tokens_and_what_was_cached_is_told_once() -> None:
    count = MAX_POLL_TOKENS + 5  # more than one poll carries
    logprobs = [Logprob(id, -id / 7, [(id, -id / 7)]) for id in range(count)]
    engine = Scripted(
        [Output("a", list(range(count)), logprobs=logprobs, cached_tokens=3)], [Output("a", [], "length")]
    )
    stage = Generate(engine, stop_checker=never)
    stage.submit("a", [1, 2, 3, 4], Sampling(logprobs=True))
    wait_for(lambda: not engine.steps, 10)
    rows = [row_of(stage), row_of(stage)]
    stage.close()
    assert [len(row.output_ids) for row in rows] == [MAX_POLL_TOKENS, 5]
    assert [id for row in rows for id in row.output_ids] == list(range(count))
    assert [logprob for row in rows for logprob in row.logprobs] == logprobs
    assert [row.cached_tokens for row in rows] == [3, 0]
    assert [row.finish_reason for row in rows] == ["", "length"]


def test_priority_and_deadline_reach_the_engine() -> None:
    engine = Scripted([Output("a", [5], "timeout")])
    stage = Generate(engine, stop_checker=never)
    before = time.monotonic()
    stage.submit("a", [1], Sampling(), asked=Terms(priority=-3, timeout_ms=500))
    wait_for(lambda: not engine.steps, 10)
    (request,) = engine.requests
    assert request.deadline is not None
    assert before + 0.5 <= request.deadline <= time.monotonic() + 0.5
    assert request.priority == -3
    row = row_of(stage)
    assert (row.output_ids, row.finish_reason) == ([5], "timeout")
    stage.submit("b", [1], Sampling())
    wait_for(lambda: len(engine.requests) == 2, 10)
    assert (engine.requests[1].deadline, engine.requests[1].priority) == (None, 0)
    stage.close()


def test_features_reach_the_engine_and_are_gone_with_the_request() -> None:
    """Pictures are large: what the stage itself holds of a request must not keep them."""
    engine = Scripted([Output("a", [5], "stop")])
    stage = Generate(engine, stop_checker=never)
    try:
        pixels = np.zeros(8, dtype=np.float32)
        gone = weakref.ref(pixels)
        features = Features({"pixel_values": pixels}, [1, -7])
        stage.submit("a", [1, 2], Sampling(), features=features)
        assert row_of(stage).finish_reason == "stop"
        (request,) = engine.requests
        assert request.features == {"pixel_values": pixels}
        assert request.identity == [1, -7]
        engine.requests.clear()
        del request, features, pixels
        wait_for(lambda: gone() is None, 10, "the stage keeps the features")
    finally:
        stage.close()


def test_pictures_wait_for_room_until_others_have_ended() -> None:
    """Eight bytes of room, six of each request: the second goes to the engine when the first has ended."""
    engine, room = Scripted(), Gate(8)
    stage = Generate(engine, stop_checker=never, room=room)

    def end(id: str) -> None:
        engine.steps.append([Output(id, [5], "stop")])
        stage.cancel("nobody")  # wakes the engine's thread

    try:
        features = Features({"pixel_values": np.zeros(6, dtype=np.uint8)}, [1, -7])
        stage.submit("a", [1, 2], Sampling(), features=features)
        second = threading.Thread(target=stage.submit, args=("b", [1, 2], Sampling()), kwargs={"features": features})
        second.start()
        wait_for(lambda: room.waiting == 1, 10, "the second does not wait")
        stage.submit("text", [1, 2], Sampling())
        wait_for(lambda: [request.id for request in engine.requests] == ["a", "text"], 10, "a text waits too")
        end("a")
        second.join(10)
        wait_for(
            lambda: [request.id for request in engine.requests] == ["a", "text", "b"], 10, "no room was given back"
        )
        with pytest.raises(StageError) as late:
            stage.submit("c", [1, 2], Sampling(), features=features, asked=Terms(timeout_ms=50))
        assert late.value.code == "timeout"
        end("b")
        wait_for(lambda: room.held == 0, 10, "room is kept by requests that have ended")
    finally:
        stage.close()


def test_a_whole_answer_that_takes_too_long_is_a_timeout() -> None:
    stage = Generate(Scripted([Output("unary-0", [5], "timeout")]), stop_checker=never)
    answers: list[Answer | StageError] = []
    stage.generate([1], Sampling(), answers.append, asked=Terms(timeout_ms=1))
    wait_for(lambda: answers, 10)
    assert isinstance(answers[0], StageError)
    assert (answers[0].code, answers[0].stage) == ("timeout", "generate")
    stage.close()


def test_a_whole_answer_has_no_place_for_log_probabilities(stage: Generate) -> None:
    with pytest.raises(StageError) as caught:
        stage.generate([1], Sampling(logprobs=True), lambda answer: None)
    assert (caught.value.param, caught.value.code) == ("logprobs", "unsupported_parameter")


class Breaking:
    """An engine whose step fails once."""

    idle_s = 0.0
    begun = ()

    def __init__(self) -> None:
        self.counters = Counters()
        self.inner = EchoEngine(LIMITS)
        self.failures = 1

    def submit(self, request: Request) -> None:
        self.inner.submit(request)

    def cancel(self, request_id: str) -> None:
        self.inner.cancel(request_id)

    @property
    def busy(self) -> bool:
        return self.inner.busy

    def step(self) -> list[Output]:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the device is lost")
        return self.inner.step()


def test_a_broken_step_is_told_to_all_and_the_next_request_runs() -> None:
    stage = Generate(Breaking(), stop_checker=never)
    answers: list[Answer | StageError] = []
    stage.generate([1, 2], Sampling(max_tokens=3), answers.append)
    wait_for(lambda: answers, 10)
    assert isinstance(answers[0], StageError)
    assert "the device is lost" in answers[0].message
    stage.generate([1, 2], Sampling(max_tokens=3), answers.append)
    wait_for(lambda: len(answers) == 2, 10)
    assert answers[1] == Answer([1, 2, 1], "length")
    stage.close()


def test_close_tells_whoever_waits() -> None:
    stage = Generate(EchoEngine(LIMITS, tokens_per_s=1), stop_checker=never)
    answers: list[Any] = []
    polls: list[Poll] = []
    stage.generate([1], Sampling(max_tokens=1000), answers.append)
    stage.poll(60, polls.append)
    wait_for(lambda: stage.counters()["running"], 10)
    stage.close()
    assert isinstance(answers[0], StageError)
    assert answers[0].code == "unavailable"
    assert len(polls) == 1
    with pytest.raises(StageError, match="shutting down"):
        stage.generate([1], Sampling(), answers.append)


def test_a_slow_reader_does_not_slow_the_engine(stage: Generate) -> None:
    """Nobody polls, and the engine still finishes: what it made waits in the mailbox."""
    done = threading.Event()
    stage.submit("unread", [1], Sampling(max_tokens=5000))
    stage.generate([1], Sampling(max_tokens=5000), lambda answer: done.set())
    assert done.wait(10)
    tokens, reason = collect(stage, "unread")["unread"]
    assert (len(tokens), reason) == (5000, "length")
