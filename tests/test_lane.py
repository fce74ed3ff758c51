"""A stream's deltas as its lane brings them: merged, failed, cancelled, and never waited for without end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from gateway import lane, lane_stream
from gateway.backend import Delta, Submission
from gateway.lane import Lane
from gateway.lane_stream import MAX_BACKLOG, LaneStream
from gateway.witness import Nobody
from pipelines import wire
from pipelines.chat import Event
from pipelines.errors import StageError
from pipelines.logprobs import Entry
from pipelines.pipeline import Pipeline
from pipelines.terms import Terms


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
                monkeypatch.setattr(lane_stream, "_SLOW_S", 0.0)  # it has waited for long enough
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


# A lane, by what its gRPC stream answers.


class ScriptedCall:
    """What `infer` gives: its requests are noted, its responses are put in."""

    def __init__(self) -> None:
        self.responses: asyncio.Queue[Any] = asyncio.Queue()
        self.asked: list[Any] = []

    def __call__(self, requests: Any) -> ScriptedCall:
        self.reading = asyncio.ensure_future(self._note(requests))
        return self

    async def _note(self, requests: Any) -> None:
        async for request in requests:
            self.asked.append(service_pb2.ModelInferRequest.FromString(request))

    async def read(self) -> Any:
        response = await self.responses.get()
        if response is None:
            raise asyncio.CancelledError  # as of a call that is cancelled
        return response

    def cancel(self) -> None:
        self.reading.cancel()
        self.responses.put_nowait(None)

    def tell(self, *events: Event) -> None:
        response = service_pb2.ModelStreamInferResponse()
        data = wire.pack_events(events, {})
        response.infer_response.raw_output_contents.append(len(data).to_bytes(4, "little") + data)
        self.responses.put_nowait(response)

    def refuse(self, id: str, message: str) -> None:
        response = service_pb2.ModelStreamInferResponse(error_message=message)
        response.infer_response.id = id
        self.responses.put_nowait(response)


def with_lane(
    scenario: Any,
    monkeypatch: pytest.MonkeyPatch,
    unhealthy: Callable[[str, str], None] = lambda pipeline, stage: None,
) -> None:
    monkeypatch.setattr(lane, "_RECONNECT_S", 0.0)

    async def main() -> None:
        calls: list[ScriptedCall] = []

        def infer(requests: Any) -> ScriptedCall:
            calls.append(ScriptedCall())
            return calls[-1](requests)

        pipeline = Pipeline(name="m", source="path:none")
        tested = Lane(pipeline, infer, 5.0, unhealthy, endpoint="", witness=Nobody())
        running = asyncio.create_task(tested.run())
        try:
            while not calls:
                await asyncio.sleep(0)
            calls[0].tell()
            while not tested.ready:
                await asyncio.sleep(0)
            await scenario(tested, calls)
        finally:
            running.cancel()
            await asyncio.wait([running])

    asyncio.run(asyncio.wait_for(main(), 10))


def asked(id: str) -> Submission:
    return Submission(id, "m", {"text": "?"}, "{}", None)


UNKNOWN = "[request id: b.1] Request for unknown model: 'm-orchestrator' has no available versions"


@pytest.mark.parametrize("message", [UNKNOWN, StageError("no lane", code="unavailable").to_json()])
def test_an_orchestrator_that_is_unloaded_ends_what_it_has(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """It refuses what is new, which is a loss and no verdict; the lane is left when its last stream has ended."""

    async def scenario(tested: Lane, calls: list[ScriptedCall]) -> None:
        running, new, gone = [await tested.submit(asked(id)) for id in ("a.1", "b.1", "c.1")]
        gone.cancel()
        calls[0].tell(Event("a.1", ["x"], prompt_tokens=1))
        calls[0].refuse("b.1", message)
        calls[0].refuse("", message)  # the cancel
        with pytest.raises(StageError) as refused:
            await new.next()
        assert refused.value.lost
        with pytest.raises(StageError, match="not ready"):
            await tested.submit(asked("d.1"))
        assert (await running.next()).texts == ["x"]
        calls[0].tell(Event("a.1", ["y"], "stop", 1, 2))
        assert (await running.next()).finish_reason == "stop"
        while len(calls) < 2:
            await asyncio.sleep(0)
        calls[1].tell()
        while not tested.ready:
            await asyncio.sleep(0)

    with_lane(scenario, monkeypatch)


def test_a_lane_that_falls_silent_is_lost_and_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "SILENT_S", 0.2)

    async def scenario(tested: Lane, calls: list[ScriptedCall]) -> None:
        waiting = await tested.submit(asked("a.1"))
        for _ in range(6):  # each within its time
            await asyncio.sleep(0.05)
            calls[0].tell()
        assert len(calls) == 1
        with pytest.raises(StageError, match=r"no heartbeat for 0\.2 s"):
            await waiting.next()
        while len(calls) < 2:
            await asyncio.sleep(0.01)

    with_lane(scenario, monkeypatch)


def test_a_refusal_of_what_was_cancelled_concerns_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, it was taken for the lane's own, and lost all of its streams."""

    async def scenario(tested: Lane, calls: list[ScriptedCall]) -> None:
        running, gone = [await tested.submit(asked(id)) for id in ("a.1", "b.1")]
        gone.cancel()
        calls[0].refuse("b.1", StageError("no such thing", param="x").to_json())
        calls[0].tell(Event("a.1", ["x"], "stop", 1, 1))
        assert (await running.next()).texts == ["x"]
        assert (len(calls), tested.ready) == (1, True)

    with_lane(scenario, monkeypatch)


def test_a_lane_that_is_refused_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(tested: Lane, calls: list[ScriptedCall]) -> None:
        running = await tested.submit(asked("a.1"))
        while len(calls[0].asked) < 2:
            await asyncio.sleep(0)
        calls[0].refuse(calls[0].asked[0].id, UNKNOWN)
        with pytest.raises(StageError, match="was lost") as lost:
            await running.next()
        assert lost.value.lost

    with_lane(scenario, monkeypatch)


def test_an_orchestrator_that_does_not_answer_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, only its requests were failed, one a second, and it was left as it was."""
    told: list[tuple[str, str]] = []

    async def scenario(tested: Lane, calls: list[ScriptedCall]) -> None:
        refused = await tested.submit(asked("a.1"))
        calls[0].refuse("a.1", "Stub process 'm-orchestrator_0_0' is not healthy.")
        with pytest.raises(StageError):
            await refused.next()
        assert told == [("m", "orchestrator")]

    with_lane(scenario, monkeypatch, lambda pipeline, stage: told.append((pipeline, stage)))


def test_a_request_ends_with_its_time_whatever_becomes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_stream, "GRACE_S", 0.0)

    async def scenario(tested: Lane, calls: list[ScriptedCall]) -> None:
        late = await tested.submit(replace(asked("a.1"), terms=Terms(timeout_ms=20)))
        with pytest.raises(StageError) as raised:
            await late.next()
        assert raised.value.code == "timeout"

    with_lane(scenario, monkeypatch)


def test_who_waits_for_a_lane_hears_that_it_is_lost() -> None:
    """A stage that died as soon as it was loaded kept its pipeline loading for ten minutes."""

    async def main() -> None:
        pipeline = Pipeline(name="m", source="path:none")
        tested = Lane(pipeline, ScriptedCall(), 5.0, lambda pipeline, stage: None, endpoint="", witness=Nobody())
        running, opening = asyncio.create_task(tested.run()), asyncio.create_task(tested.opened())
        await asyncio.sleep(0)
        tested.lose(StageError("it died", code="unavailable"))
        with pytest.raises(StageError, match="it died"):
            await asyncio.wait_for(opening, 5)
        await asyncio.wait_for(running, 5)

    asyncio.run(main())
