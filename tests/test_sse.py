"""Server-sent events as bytes, and the writer over a scripted stream."""

import asyncio
import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import sse
from gateway.backend import Delta
from gateway.errors import failure_of
from gateway.protocol import CHAT, COMPLETION, Head
from gateway.sse import Events, Written, write_stream
from pipelines.errors import StageError

HEAD = Head("chatcmpl-123", 1694268190, "gpt-4o-mini")


def decode(data: bytes) -> list[str]:
    """The events' data. WHATWG HTML 9.2.6: a blank line ends an event; its line begins `data: `."""
    assert data.endswith(b"\n\n") or not data
    events = data.decode().split("\n\n")[:-1]
    for event in events:
        assert event.startswith("data: ")
        assert event.splitlines() == [event], "some clients take this for two lines"
    return [event.removeprefix("data: ") for event in events]


def test_a_chat_stream_byte_for_byte():
    events = Events(CHAT, HEAD, include_usage=False)
    head = b'"id":"chatcmpl-123","object":"chat.completion.chunk","created":1694268190,"model":"gpt-4o-mini"'
    assert events.opening() == (
        b"data: {" + head + b',"choices":[{"index":0,"delta":{"role":"assistant","content":""},'
        b'"logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert events.texts(["Hello"]) == (
        b"data: {" + head + b',"choices":[{"index":0,"delta":{"content":"Hello"},'
        b'"logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert events.closing(Delta([], "length", 9, 12)) == (
        b"data: {" + head + b',"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}\n\n'
        b"data: [DONE]\n\n"
    )


def test_usage_is_null_until_its_own_chunk():
    """OpenAI, include_usage: "an additional chunk will be streamed before the `data: [DONE]` message"."""
    events = Events(CHAT, HEAD, include_usage=True)
    data = events.opening() + events.texts(["a", "b"]) + events.closing(Delta([], "stop", 9, 12))
    *chunks, usage, done = decode(data)
    assert done == "[DONE]"
    assert all(json.loads(chunk)["usage"] is None for chunk in chunks)
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"] == {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}


def test_a_completion_stream_has_no_opening():
    events = Events(COMPLETION, HEAD, include_usage=False)
    assert events.opening() == b""
    assert json.loads(decode(events.texts(["x"]))[0])["choices"] == [
        {"index": 0, "text": "x", "logprobs": None, "finish_reason": None}
    ]
    assert json.loads(decode(events.closing(Delta([], "stop")))[0])["choices"][0]["text"] == ""


@given(st.lists(st.text(), max_size=4))
def test_any_text_arrives_whole_one_event_each(texts):
    """And an event is one line to every client, also to those that split lines as str.splitlines does."""
    events = Events(CHAT, HEAD, include_usage=False)
    contents = [json.loads(data)["choices"][0]["delta"]["content"] for data in decode(events.texts(texts))]
    assert contents == [text for text in texts if text]


@pytest.mark.parametrize("char", ["\n", "\r", "\x0b", "\x1c", "\x85", "\u2028", "\u2029", "\0", '"', "\\", "é", "𝄞"])
def test_hard_characters(char):
    data = Events(CHAT, HEAD, include_usage=False).texts([char])
    assert json.loads(decode(data)[0])["choices"][0]["delta"]["content"] == char


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


def write(first, *steps, include_usage=False):
    sent = []
    written = Written()

    async def send(message):
        sent.append(message)

    async def run():
        events = Events(CHAT, HEAD, include_usage)
        await write_stream(send, Script(*steps), first, events, written, lambda error: failure_of(error, "r1"))

    asyncio.run(run())
    return sent, written


def test_one_delta_is_one_send():
    sent, written = write(Delta([], prompt_tokens=3), Delta(["a", "b", "c"]), Delta(["d"], "stop", 3, 4))
    start, *bodies = sent
    assert (start["status"], dict(start["headers"])[b"content-type"]) == (
        200,
        b"text/event-stream; charset=utf-8",
    )
    assert [len(decode(body["body"])) for body in bodies] == [1, 3, 3]
    assert [body["more_body"] for body in bodies] == [True, True, False]
    assert (written.events, written.bytes) == (4, sum(len(body["body"]) for body in bodies))
    assert written.last.completion_tokens == 4
    assert written.failure is None


def test_a_first_delta_may_be_the_last():
    sent, _ = write(Delta(["all"], "stop", 1, 1))
    assert len(sent) == 2
    assert len(decode(sent[1]["body"])) == 4


def test_a_delta_without_text_sends_nothing():
    sent, _ = write(Delta([]), Delta([]), Delta([""]), Delta([], "stop", 1, 0))
    assert [len(decode(body["body"])) for body in sent[1:]] == [1, 2]


def test_an_error_ends_the_stream_without_done():
    failure = StageError("No cache left.", code="unavailable", stage="generate")
    sent, written = write(Delta([]), Delta(["a"]), failure)
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
    assert written.last is None


def test_a_bug_in_the_stream_shows_nothing_of_itself():
    sent, written = write(Delta([]), ValueError("secret /path"))
    assert b"secret" not in sent[-1]["body"]
    assert written.failure.status == 500


def test_text_that_is_no_unicode_is_an_error_not_a_hang():
    sent, written = write(Delta([]), Delta(["\ud800"]))
    assert written.failure.status == 500
    assert sent[-1]["more_body"] is False


def test_the_error_event_is_what_the_official_client_raises_on():
    """openai-python's stream raises APIError for an event whose data has a truthy `error`."""
    failure = failure_of(StageError("no", code="timeout"), "r1")
    assert sse.event(failure.body()) == b"data: " + orjson.dumps(failure.body()) + b"\n\n"
    assert json.loads(decode(Events.error(failure))[0])["error"]["message"] == "no"
