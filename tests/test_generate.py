"""The generate stage around an engine: answers, polls, cancels, an engine that breaks, and a close that tells all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.engine import Counters, Limits, Output, Request
from pipelines.engine.echo import EchoEngine
from pipelines.errors import StageError
from pipelines.generate import MAX_POLL_TOKENS, Answer, Generate, Poll
from pipelines.sampling import Sampling
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


class Breaking:
    """An engine whose step fails once."""

    idle_s = 0.0

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
