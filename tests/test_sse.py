"""Server-sent events as bytes, and the writer over a scripted stream."""

import asyncio
import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import sse
from gateway.backend import Delta
from gateway.choices import Choice, Merged, Totals
from gateway.errors import failure_of
from gateway.objects import Head
from gateway.protocol import CHAT, COMPLETION
from gateway.sse import Events, Written, write_stream
from pipelines.errors import StageError
from pipelines.logprobs import Entry

HEAD = Head("chatcmpl-123", "chat.completion.chunk", 1694268190, "gpt-4o-mini")


def events_of(operation=CHAT, choices=1, include_usage=False):
    return Events(operation, HEAD, [Choice(operation, index) for index in range(choices)], include_usage=include_usage)


def closing(events, *last):
    """The end of a stream: the last delta of each choice, and what comes after them."""
    totals = Totals(len(last))
    for index, delta in enumerate(last):
        totals.add(index, delta)
    return b"".join(events.delta(index, delta) for index, delta in enumerate(last)) + events.closing(totals)


def decode(data: bytes) -> list[str]:
    """The events' data. WHATWG HTML 9.2.6: a blank line ends an event; its line begins `data: `."""
    assert data.endswith(b"\n\n") or not data
    events = data.decode().split("\n\n")[:-1]
    for event in events:
        assert event.startswith("data: ")
        assert event.splitlines() == [event], "some clients take this for two lines"
    return [event.removeprefix("data: ") for event in events]


def test_a_chat_stream_byte_for_byte():
    events = events_of()
    head = b'"id":"chatcmpl-123","object":"chat.completion.chunk","created":1694268190,"model":"gpt-4o-mini"'
    assert events.opening() == (
        b"data: {" + head + b',"choices":[{"index":0,"delta":{"role":"assistant","content":""},'
        b'"logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert events.delta(0, Delta(["Hello"])) == (
        b"data: {" + head + b',"choices":[{"index":0,"delta":{"content":"Hello"},'
        b'"logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert closing(events, Delta([], "length", 9, 12)) == (
        b"data: {" + head + b',"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}\n\n'
        b"data: [DONE]\n\n"
    )


def test_usage_is_null_until_its_own_chunk():
    """OpenAI, include_usage: "an additional chunk will be streamed before the `data: [DONE]` message"."""
    events = events_of(include_usage=True)
    data = (
        events.opening()
        + events.delta(0, Delta(["a", "b"]))
        + closing(events, Delta([], "stop", 9, 12, cached_tokens=5))
    )
    *chunks, usage, done = decode(data)
    assert done == "[DONE]"
    assert all(json.loads(chunk)["usage"] is None for chunk in chunks)
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 12,
        "total_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 5},
    }


def test_a_completion_stream_has_no_opening():
    events = events_of(COMPLETION)
    assert events.opening() == b""
    assert json.loads(decode(events.delta(0, Delta(["x"])))[0])["choices"] == [
        {"index": 0, "text": "x", "logprobs": None, "finish_reason": None}
    ]
    assert json.loads(decode(closing(events, Delta([], "stop")))[0])["choices"][0]["text"] == ""


@given(
    st.lists(
        st.text(st.one_of(st.sampled_from('"\\\x7f\u2028é,'), st.characters(exclude_categories=["Cs"]))), max_size=12
    )
)
def test_any_text_arrives_whole_one_event_each(texts):
    """And an event is one line to every client, also to those that split lines as str.splitlines does."""
    events = events_of()
    contents = [json.loads(data)["choices"][0]["delta"]["content"] for data in decode(events.delta(0, Delta(texts)))]
    assert contents == [text for text in texts if text]


@pytest.mark.parametrize(
    "char", ["\n", "\r", "\x0b", "\x1c", "\x85", "\u2028", "\u2029", "\0", "\x7f", '"', "\\", "é", "𝄞"]
)
@pytest.mark.parametrize("count", [1, 9])
def test_hard_characters(char, count):
    data = decode(events_of().delta(0, Delta([char] * count)))
    assert [json.loads(event)["choices"][0]["delta"]["content"] for event in data] == [char] * count


def test_many_texts_are_the_events_that_each_would_be():
    texts = ["one", " two", '"three",', "four\u2028", "five\x00", " six"]
    one_by_one = b"".join(events_of().delta(0, Delta([text])) for text in texts)
    assert events_of().delta(0, Delta(texts)) == one_by_one


class Script:
    """A stream that plays its steps."""

    def __init__(self, *steps):
        self.steps = list(steps)

    async def next(self):
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def cancel(self):
        raise AssertionError("the writer does not cancel: whoever owns the stream does")


def write(*streams, include_usage=False):
    """Writes the choices that play these steps; of each the first is its acceptance."""
    sent = []
    written = Written(Totals(len(streams)))

    async def send(message):
        sent.append(message)

    async def run():
        deltas = Merged([Script(*steps) for steps in streams])
        events = events_of(choices=len(streams), include_usage=include_usage)
        first = await deltas.accepted()
        await write_stream(send, deltas, first, events, written, lambda error: failure_of(error, "r1"))

    asyncio.run(run())
    return sent, written


def bodies(sent):
    """The events of each send, parsed."""
    return [[json.loads(data) if data != "[DONE]" else data for data in decode(body["body"])] for body in sent[1:]]


def test_choices_share_a_stream_and_end_each_for_itself():
    entries = [[Entry("b", [98], -0.5, [])]]
    sent, written = write(
        [Delta([], prompt_tokens=3), Delta(["a"]), Delta(["c"], "length", 3, 2, cached_tokens=1)],
        [Delta([], prompt_tokens=3), Delta(["b"], logprobs=entries), Delta([], "stop", 3, 1, cached_tokens=3)],
        include_usage=True,
    )
    opening, *_, last = bodies(sent)
    assert [chunk["choices"][0]["index"] for chunk in opening] == [0, 1]
    assert last[-1] == "[DONE]"
    chunks = [chunk for body in bodies(sent)[1:] for chunk in body if chunk != "[DONE]"]
    *chunks, usage = chunks
    # The prompt counts once, and so does what of it was cached.
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert (usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"], usage["choices"]) == (3, 3, [])
    told = {0: [], 1: []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        told[choice["index"]].append((choice["delta"].get("content"), choice["finish_reason"]))
        assert (choice["logprobs"] is not None) == (choice["delta"].get("content") == "b")
    assert told == {0: [("a", None), ("c", None), (None, "length")], 1: [("b", None), (None, "stop")]}
    assert (written.totals.finish_reasons, written.events) == (["length", "stop"], 3)


def test_a_choice_that_fails_ends_the_stream():
    sent, written = write(
        [Delta([], prompt_tokens=3), Delta(["a"]), Delta(["b"], "stop", 3, 2)],
        [Delta([], prompt_tokens=3), StageError("No cache left.", code="unavailable", stage="generate")],
    )
    assert bodies(sent)[-1][-1]["error"]["code"] == "unavailable"
    assert written.failure.code == "unavailable"
    assert b"[DONE]" not in sent[-1]["body"]


def test_entries_without_text_have_a_chunk():
    """A token whose text is still held back, or is empty: its entry is never lost."""
    events = events_of()
    (data,) = decode(events.delta(0, Delta(["", ""], logprobs=[[], [Entry("", [], -0.1, [])]])))
    assert json.loads(data)["choices"][0]["delta"] == {"content": ""}
    assert len(json.loads(data)["choices"][0]["logprobs"]["content"]) == 1


def test_one_delta_is_one_send():
    sent, written = write([Delta([], prompt_tokens=3), Delta(["a", "b", "c"]), Delta(["d"], "stop", 3, 4)])
    start, *bodies = sent
    assert (start["status"], dict(start["headers"])[b"content-type"]) == (
        200,
        b"text/event-stream; charset=utf-8",
    )
    assert [len(decode(body["body"])) for body in bodies] == [1, 3, 3]
    assert [body["more_body"] for body in bodies] == [True, True, False]
    assert (written.events, written.bytes) == (4, sum(len(body["body"]) for body in bodies))
    assert written.totals.completion_tokens == 4
    assert written.failure is None


def test_a_first_delta_may_be_the_last():
    sent, _ = write([Delta(["all"], "stop", 1, 1)])
    assert len(sent) == 2
    assert len(decode(sent[1]["body"])) == 4


def test_a_delta_without_text_sends_nothing():
    sent, _ = write([Delta([]), Delta([]), Delta([""]), Delta([], "stop", 1, 0)])
    assert [len(decode(body["body"])) for body in sent[1:]] == [1, 2]


def test_an_error_ends_the_stream_without_done():
    failure = StageError("No cache left.", code="unavailable", stage="generate")
    sent, written = write([Delta([]), Delta(["a"]), failure])
    assert sent[-1]["more_body"] is False
    (error,) = decode(sent[-1]["body"])
    assert json.loads(error) == {
        "error": {
            "message": "No cache left. (stage: generate)",
            "type": "server_error",
            "param": None,
            "code": "unavailable",
            "stage": "generate",
        }
    }
    assert not any(b"[DONE]" in body["body"] for body in sent[1:])
    assert written.failure.code == "unavailable"
    assert not written.totals.last


def test_a_bug_in_the_stream_shows_nothing_of_itself():
    sent, written = write([Delta([]), ValueError("secret /path")])
    assert b"secret" not in sent[-1]["body"]
    assert written.failure.status == 500


def test_text_that_is_no_unicode_is_an_error_not_a_hang():
    sent, written = write([Delta([]), Delta(["\ud800"])])
    assert written.failure.status == 500
    assert sent[-1]["more_body"] is False


def test_the_error_event_is_what_the_official_client_raises_on():
    """openai-python's stream raises APIError for an event whose data has a truthy `error`."""
    failure = failure_of(StageError("no", code="timeout"), "r1")
    assert sse.event(failure.body()) == b"data: " + orjson.dumps(failure.body()) + b"\n\n"
    assert json.loads(decode(Events.error(failure))[0])["error"]["message"] == "no"


def test_timing_is_in_the_usages_chunk_and_nowhere_else():
    taken = {"prefill": 12.5, "total": 40.0}
    events = Events(CHAT, HEAD, [Choice(CHAT, 0)], include_usage=True, timing=lambda totals: taken)
    *chunks, usage, done = decode(events.opening() + closing(events, Delta(["a"], "stop", 9, 12)))
    assert done == "[DONE]"
    assert all("timing" not in json.loads(chunk) for chunk in chunks)
    assert json.loads(usage)["timing"] == taken
    assert json.loads(usage)["usage"]["completion_tokens"] == 12
