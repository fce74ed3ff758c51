"""The orchestration of many requests without Triton: what each listener hears, in every order of events."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from pipelines.chat import COALESCE_S, HEARTBEAT_S, Chat, Event, Inputs, Prompt, Text, Window
from pipelines.engine import Logprob
from pipelines.errors import StageError
from pipelines.generate import Poll, Row
from pipelines.logprobs import Entry
from pipelines.terms import Terms


class Script:
    """Stages whose answers are scripted: ids are code points, so that the text of an id is its character."""

    def __init__(self) -> None:
        self.submitted: dict[str, list[int]] = {}
        self.asked: dict[str, Terms] = {}
        self.seen: tuple[object, list[tuple[int, int]]] | tuple[()] = ()
        self.features: dict[str, object] = {}
        self.cancelled: list[str] = []
        self.polls: list[Poll] = []
        self.waits: list[float] = []
        self.fail: dict[str, StageError] = {}
        self.during_preprocess: Any = None
        self.texts: list[Callable[[Window], Text]] = []

    def preprocess(self, inputs: Inputs, sampling: str, traceparent: str | None) -> Prompt:
        self._maybe_fail("preprocess")
        if self.during_preprocess:
            self.during_preprocess()
        return Prompt([ord(char) for char in str(inputs["text"])], sampling, *self.seen)

    def submit(self, id: str, prompt: Prompt, asked: Terms, traceparent: str | None) -> None:
        self._maybe_fail("submit")
        self.submitted[id], self.asked[id] = list(prompt.input_ids), asked
        self.features[id] = prompt.features

    def poll(self, wait_s: float) -> Poll:
        self.waits.append(wait_s)
        return self.polls.pop(0) if self.polls else Poll([], {})

    def cancel(self, id: str) -> None:
        self.cancelled.append(id)

    def postprocess(self, windows: list[Window]) -> list[Text]:
        self._maybe_fail("postprocess")
        if self.texts:
            return [self.texts.pop(0)(window) for window in windows]
        return [Text(["".join(map(chr, window.ids))], len(window.ids), 0) for window in windows]

    def trace_postprocess(self, *args: Any) -> None: ...

    def _maybe_fail(self, stage: str) -> None:
        if stage in self.fail:
            raise self.fail[stage]


class Listener:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.has_gone = False
        self.waiting = False
        self.ended = False

    def push(self, event: Event) -> None:
        self.events.append(event)

    def flush(self, counters: Mapping[str, int], *, now: float) -> bool:
        return self.waiting

    def gone(self) -> bool:
        return self.has_gone

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def chat(script: Script) -> Chat:
    return Chat(script)


def begin(chat: Chat, sink: Listener, handle: str = "h", id: str = "a", text: str = "xyz") -> None:
    chat.admit(handle, id, sink, None)
    chat.start(handle, {"text": text}, "{}")


def test_a_request_from_start_to_end(chat: Chat, script: Script) -> None:
    sink = Listener()
    begin(chat, sink)
    assert script.submitted == {"h": [120, 121, 122]}
    assert sink.events == [Event("a", [], prompt_tokens=3)]  # accepted: headers may go out
    script.polls = [Poll([Row("h", [72, 105])], {}), Poll([Row("h", [33], "stop", stages={"decode": 5.0})], {})]
    chat.turn()
    chat.turn()
    first, last = sink.events[1:]
    assert first == Event("a", ["Hi"])
    assert (last.texts, last.finish_reason, last.prompt_tokens, last.completion_tokens) == (["!"], "stop", 3, 3)
    assert list(last.stages) == ["preprocess", "decode", "postprocess"]
    assert chat.idle


def test_tokens_that_overtake_the_acceptance_carry_it(chat: Chat, script: Script) -> None:
    """generate may answer a poll before the submit call has returned: prompt_tokens comes once, in the first event."""
    sink = Listener()
    chat.admit("h", "a", sink, None)
    script.polls = [Poll([Row("h", [72])], {})]
    submit = script.submit
    script.submit = lambda *args: (submit(*args), chat.turn())[0]  # type: ignore[assignment,method-assign]
    chat.start("h", {"text": "xyz"}, "{}")
    assert sink.events == [Event("a", ["H"], prompt_tokens=3)]


def test_features_go_to_generate_and_sizes_to_the_listener(chat: Chat, script: Script) -> None:
    features, sizes = object(), [(640, 480), (1, 1)]
    script.seen = (features, sizes)
    sink = Listener()
    begin(chat, sink)
    assert script.features["h"] is features
    assert sink.events == [Event("a", [], prompt_tokens=3, pictures=sizes)]
    script.polls = [Poll([Row("h", [72])], {}), Poll([Row("h", [33], "stop")], {})]
    chat.turn()
    chat.turn()
    assert [event.pictures for event in sink.events[1:]] == [(), ()]  # once is enough


def test_sizes_come_with_tokens_that_overtake_the_acceptance(chat: Chat, script: Script) -> None:
    script.seen = (None, [(2, 3)])
    sink = Listener()
    chat.admit("h", "a", sink, None)
    script.polls = [Poll([Row("h", [72], "stop")], {})]
    submit = script.submit
    script.submit = lambda *args: (submit(*args), chat.turn())[0]  # type: ignore[assignment,method-assign]
    chat.start("h", {"text": "xyz"}, "{}")
    assert [event.pictures for event in sink.events] == [[(2, 3)]]


@pytest.mark.parametrize("stage", ["preprocess", "submit"])
def test_a_refusal_is_the_only_event(chat: Chat, script: Script, stage: str) -> None:
    script.fail[stage] = StageError("no", code="context_length_exceeded", stage=stage)
    sink = Listener()
    begin(chat, sink)
    assert [event.error for event in sink.events] == [script.fail[stage]]
    assert chat.idle


def test_a_failed_postprocess_fails_its_requests_and_stops_them(chat: Chat, script: Script) -> None:
    sinks = {handle: Listener() for handle in "gh"}
    for handle, sink in sinks.items():
        begin(chat, sink, handle)
    script.fail["postprocess"] = StageError("broken", code="internal", stage="postprocess")
    script.polls = [Poll([Row("g", [72]), Row("h", [72], "length")], {})]
    chat.turn()
    assert [sink.events[-1].error for sink in sinks.values()] == [script.fail["postprocess"]] * 2
    assert script.cancelled == ["g"]  # the other had finished
    assert chat.idle


def test_an_engine_error_names_generate(chat: Chat, script: Script) -> None:
    sink = Listener()
    begin(chat, sink)
    script.polls = [Poll([Row("h", [], "error", "out of memory")], {})]
    chat.turn()
    error = sink.events[-1].error
    assert error is not None
    assert (error.stage, error.message, sink.events[-1].finish_reason) == ("generate", "out of memory", "")


def test_a_deadline_that_passes_is_a_timeout_of_generate(chat: Chat, script: Script) -> None:
    """After what was made until then: its text and counts are told."""
    sink = Listener()
    chat.admit("h", "a", sink, None)
    chat.start("h", {"text": "xyz"}, "{}", Terms(priority=-2, timeout_ms=60_000))
    assert script.asked["h"].priority == -2
    assert 0 < (script.asked["h"].timeout_ms or 0) <= 60_000
    script.polls = [Poll([Row("h", [72], "timeout")], {})]
    chat.turn()
    last = sink.events[-1]
    assert last.error is not None
    assert (last.error.code, last.error.stage, last.finish_reason, last.texts) == ("timeout", "generate", "", ["H"])
    assert chat.idle


def test_time_that_preprocess_took_is_not_given_again(chat: Chat, script: Script) -> None:
    sink = Listener()
    script.during_preprocess = lambda: time.sleep(0.02)
    chat.admit("h", "a", sink, None)
    chat.start("h", {"text": "xyz"}, "{}", Terms(timeout_ms=10))
    assert [event.error.code for event in sink.events if event.error] == ["timeout"]
    assert script.submitted == {}
    assert chat.idle


@pytest.mark.parametrize(("engines", "told"), [("length", "stop"), ("stop", "stop"), ("cancelled", "cancelled")])
def test_a_stop_string_that_only_the_end_settles_is_the_finish_reason(
    chat: Chat, script: Script, engines: str, told: str
) -> None:
    sink = Listener()
    begin(chat, sink)
    script.polls = [Poll([Row("h", [72], engines)], {})]
    script.texts = [lambda window: Text(["H"], 1, 0, stopped=True)]
    chat.turn()
    assert sink.events[-1].finish_reason == told


def test_log_probabilities_wait_for_the_text_of_their_token(chat: Chat, script: Script) -> None:
    sink = Listener()
    begin(chat, sink)
    first, second, third = (Logprob(id, -0.5, []) for id in (72, 105, 33))
    entry = Entry("H", [72], -0.5, [])
    seen: list[Window] = []

    def hold(window: Window) -> Text:
        seen.append(window._replace(ids=list(window.ids), logprobs=list(window.logprobs)))
        return Text([""], 0, 0, logprobs=[[]])

    def release(window: Window) -> Text:
        hold(window)
        return Text(["H"], 1, 0, logprobs=[[entry]], told=1)

    script.texts = [hold, release, hold]
    script.polls = [
        Poll([Row("h", [72], cached_tokens=2, logprobs=[first])], {}),
        Poll([Row("h", [105], logprobs=[second])], {}),
        Poll([Row("h", [33], "length", logprobs=[third])], {}),
    ]
    for _ in range(3):
        chat.turn()
    assert [(window.ids, window.logprobs) for window in seen] == [
        ([72], [first]),
        ([72, 105], [first, second]),
        ([105, 33], [second, third]),
    ]
    assert [event.logprobs for event in sink.events[1:]] == [[[]], [[entry]], [[]]]
    assert [event.cached_tokens for event in sink.events] == [0, 0, 0, 2]


def test_cancel_silences_and_stops(chat: Chat, script: Script) -> None:
    sink = Listener()
    begin(chat, sink)
    chat.cancel("h")
    chat.cancel("h")
    assert script.cancelled == ["h"]
    script.polls = [Poll([Row("h", [72])], {}), Poll([Row("h", [], "cancelled")], {})]
    chat.turn()
    chat.turn()
    assert sink.events == [Event("a", [], prompt_tokens=3)]
    assert chat.idle


def test_cancel_during_preprocess_is_not_lost(chat: Chat, script: Script) -> None:
    sink = Listener()
    script.during_preprocess = lambda: chat.cancel("h")
    begin(chat, sink)
    assert script.cancelled[-1] == "h"
    assert sink.events == []
    assert chat.idle


def test_cancel_before_the_start_submits_nothing(chat: Chat, script: Script) -> None:
    chat.admit("h", "a", Listener(), None)
    chat.cancel("h")
    chat.start("h", {"text": "xyz"}, "{}")
    assert script.submitted == {}


def test_a_listener_that_has_gone_loses_its_requests_only(chat: Chat, script: Script) -> None:
    lane, stream = Listener(), Listener()
    chat.attach(lane)
    begin(chat, lane, "lane/1")
    begin(chat, stream, "stream-1")
    lane.has_gone = True
    assert chat.turn() == [lane]
    assert script.cancelled == ["lane/1"]
    assert (lane.ended, stream.ended) == (True, False)
    assert not chat.idle


def test_rows_of_a_predecessor_are_cancelled(chat: Chat, script: Script) -> None:
    """A reloaded orchestrator finds requests it never made."""
    script.polls = [Poll([Row("old", [1, 2])], {})]
    chat.turn()
    assert script.cancelled == ["old"]


def test_a_handle_is_taken_once(chat: Chat) -> None:
    chat.admit("h", "a", Listener(), None)
    with pytest.raises(StageError, match="'a' is running already"):
        chat.admit("h", "a", Listener(), None)


def test_held_text_is_polled_for_soon(chat: Chat, script: Script) -> None:
    sink = Listener()
    begin(chat, sink)
    chat.turn()
    sink.waiting = True
    chat.turn()
    chat.turn()
    assert script.waits == [HEARTBEAT_S, HEARTBEAT_S, COALESCE_S]


def test_any_order_of_events_tells_each_request_its_own_story(chat: Chat, script: Script) -> None:
    """Random starts, tokens, cancels and ends: every listener hears all of its text, once, in order, then one end."""
    for seed in range(200):
        dice = random.Random(seed)
        script, sink = Script(), Listener()
        chat = Chat(script)
        left = {f"h{number}": dice.randrange(1, 12) for number in range(6)}
        told: dict[str, str] = dict.fromkeys(left, "")
        for handle in left:
            begin(chat, sink, handle, id=handle)
        cancelled = set()
        while left:
            if dice.random() < 0.1:
                handle = dice.choice(sorted(left))
                chat.cancel(handle)
                cancelled.add(handle)
                del left[handle]
                continue
            rows = []
            for handle in dice.sample(sorted(left), dice.randrange(1, len(left) + 1)):
                count = dice.randrange(0, left[handle] + 1)
                left[handle] -= count
                ids = [dice.randrange(97, 123) for _ in range(count)]
                told[handle] += "".join(map(chr, ids))
                reason = "" if left[handle] else "length"
                rows.append(Row(handle, ids, reason))
                if reason:
                    del left[handle]
            script.polls = [Poll(rows, {})]
            chat.turn()
        for handle in told:
            events = [event for event in sink.events if event.id == handle]
            assert "".join(text for event in events for text in event.texts) == told[handle]
            assert [event.last for event in events[:-1]] == [False] * (len(events) - 1)
            assert events[-1].last == (handle not in cancelled)
        assert chat.idle
