"""A stream's deltas as its lane brings them: merged, failed, cancelled, and never waited for without end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway import lane
from gateway.backend import Delta
from gateway.lane import MAX_BACKLOG, LaneStream
from pipelines.chat import Event
from pipelines.errors import StageError
from pipelines.logprobs import Entry


def run(scenario: Any) -> list[str]:
    """The scenario with a stream; answers what was cancelled."""
    cancelled: list[str] = []

    async def main() -> None:
        await scenario(LaneStream("a", cancelled.append, accept_timeout_s=0.05))

    asyncio.run(asyncio.wait_for(main(), 10))
    return cancelled


def test_what_came_meanwhile_is_one_delta() -> None:
    async def scenario(stream: LaneStream) -> None:
        stream.push(Event("a", [], prompt_tokens=3))
        stream.push(Event("a", ["x"]))
        stream.push(Event("a", ["y", "z"], "stop", 3, 4, {"decode": 1.0}))
        assert await stream.next() == Delta(["x", "y", "z"], "stop", 3, 4, {"decode": 1.0})
        stream.cancel()

    assert run(scenario) == []  # it had ended


def test_entries_stay_with_their_texts() -> None:
    one, two = [Entry("x", [120], -0.1, [])], [Entry("z", [122], -0.2, [])]

    async def scenario(stream: LaneStream) -> None:
        stream.push(Event("a", [], prompt_tokens=3))
        stream.push(Event("a", ["x"], logprobs=[one]))
        stream.push(Event("a", ["y"]))  # held back until now, and its entry has gone before
        stream.push(Event("a", ["z"], "stop", 3, 4, logprobs=[two], cached_tokens=2))
        delta = await stream.next()
        assert (delta.texts, delta.logprobs, delta.cached_tokens) == (["x", "y", "z"], [one, [], two], 2)

    run(scenario)


def test_the_sizes_of_the_pictures_are_in_the_first_delta() -> None:
    async def scenario(stream: LaneStream) -> None:
        stream.push(Event("a", [], prompt_tokens=3, pictures=[(640, 480)]))
        stream.push(Event("a", ["x"]))
        assert await stream.next() == Delta(["x"], prompt_tokens=3, pictures=[(640, 480)])
        stream.push(Event("a", ["y"], "stop", 3, 4))
        assert await stream.next() == Delta(["y"], "stop", 3, 4)

    run(scenario)


def test_a_request_that_is_not_taken_is_a_timeout() -> None:
    async def scenario(stream: LaneStream) -> None:
        with pytest.raises(StageError) as error:
            await stream.next()
        assert (error.value.code, error.value.stage) == ("timeout", "preprocess")
        stream.cancel()

    assert run(scenario) == ["a"]


def test_once_taken_silence_is_legitimate() -> None:
    async def scenario(stream: LaneStream) -> None:
        stream.push(Event("a", [], prompt_tokens=3))
        assert (await stream.next()).prompt_tokens == 3
        asyncio.get_running_loop().call_later(0.3, stream.push, Event("a", ["x"], "length", 3, 1))
        assert (await stream.next()).texts == ["x"]

    assert run(scenario) == []


def test_a_failure_comes_after_what_was_said() -> None:
    async def scenario(stream: LaneStream) -> None:
        stream.push(Event("a", ["x"], prompt_tokens=3))
        stream.push(Event("a", [], error=StageError("gone", code="unavailable", stage="generate")))
        assert (await stream.next()).texts == ["x"]
        with pytest.raises(StageError, match="gone"):
            await stream.next()
        stream.cancel()
        stream.cancel()

    assert run(scenario) == []


def test_cancel_is_said_once() -> None:
    async def scenario(stream: LaneStream) -> None:
        stream.cancel()
        stream.cancel()

    assert run(scenario) == ["a"]


def test_what_a_client_does_not_read_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(stream: LaneStream) -> None:
        stream.push(Event("a", [], prompt_tokens=3))
        await stream.next()
        for number in range(100_000):
            stream.push(Event("a", ["word"]))
            if number == 100:
                monkeypatch.setattr(lane, "_SLOW_S", 0.0)  # it has waited for long enough
            if stream._error:
                break
        assert 100 < number < MAX_BACKLOG / 60
        with pytest.raises(StageError, match="not read as fast") as error:
            await stream.next()
        assert error.value.code == "timeout"
        stream.push(Event("a", ["late"]))
        stream.cancel()

    assert run(scenario) == ["a"]


def test_a_burst_is_not_a_slow_client() -> None:
    """An engine may bring thousands of tokens before anybody had the time to read."""

    async def scenario(stream: LaneStream) -> None:
        stream.push(Event("a", [], prompt_tokens=3))
        await stream.next()
        for _ in range(3000):
            stream.push(Event("a", ["x" * 50]))
        stream.push(Event("a", [], "stop", 3, 3000))
        delta = await stream.next()
        assert (len(delta.texts), delta.finish_reason) == (3000, "stop")

    assert run(scenario) == []
