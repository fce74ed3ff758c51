"""Several choices and log probabilities, as the official client reads them; a backend that plays scripts."""

import itertools
import json

import pytest

from gateway.backend import Delta
from pipelines.errors import StageError
from pipelines.logprobs import Entry
from tests.scripted import (
    ACCEPTED,
    CHAT_PATH,
    COMPLETION_PATH,
    FOREVER,
    HELLO,
    MODEL,
    PROMPT,
    wait_for,
)

# Several choices.


def test_the_official_client_gets_its_choices(server, backend):
    backend.each = [
        [ACCEPTED, 0.05, Delta(["one"], "stop", 3, 2, cached_tokens=1)],
        [ACCEPTED, Delta(["t", "wo"], "length", 3, 5, cached_tokens=3)],
    ]
    with server.client() as client:
        answer = client.chat.completions.create(**HELLO, n=2, seed=7)
    assert [(choice.index, choice.message.content, choice.finish_reason) for choice in answer.choices] == [
        (0, "one", "stop"),
        (1, "two", "length"),
    ]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 7, 10)
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert [json.loads(submission.sampling)["seed"] for submission in backend.submissions] == [7, 8]
    assert len({submission.id for submission in backend.submissions}) == 2
    wait_for(lambda: all(stream.cancelled_at for stream in backend.streams))


def test_the_official_client_streams_its_choices(server, backend):
    backend.each = [
        [ACCEPTED, 0.05, Delta(["a"]), 0.05, Delta(["b"], "stop", 3, 2)],
        [ACCEPTED, Delta(["c"]), 0.02, Delta(["d"]), Delta(["e"], "length", 3, 5)],
    ]
    told = {0: "", 1: ""}
    reasons = {}
    with server.client() as client:
        options = {"include_usage": True}
        *chunks, last = client.completions.create(model=MODEL, prompt=["x", "y"], stream=True, stream_options=options)
    for chunk in chunks:
        (choice,) = chunk.choices
        assert choice.index not in reasons
        told[choice.index] += choice.text
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert (told, reasons) == ({0: "ab", 1: "cde"}, {0: "stop", 1: "length"})
    assert last.usage.prompt_tokens == 6  # two prompts
    assert last.usage.completion_tokens == 7
    assert [submission.inputs for submission in backend.submissions] == [{"text": "x"}, {"text": "y"}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_fails_cancels_the_others(server, backend, stream):
    failure = StageError("No cache left.", code="overloaded", stage="generate")
    backend.each = [[ACCEPTED, FOREVER], [ACCEPTED, 0.05, failure], [ACCEPTED, FOREVER]]
    response = server.post(CHAT_PATH, {**HELLO, "n": 3, "stream": stream})
    assert "No cache left." in response.text
    assert "[DONE]" not in response.text
    assert all(stream.cancelled.wait(5) for stream in backend.streams)


def test_a_choice_that_is_refused_is_refused_before_the_headers(server, backend):
    backend.each = [[ACCEPTED, Delta(["a"]), FOREVER], [StageError("Too long.", code="context_length_exceeded")]]
    response = server.post(COMPLETION_PATH, {**PROMPT, "prompt": ["a", "b"], "stream": True})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert all(stream.cancelled.wait(5) for stream in backend.streams)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_every_choice(server, backend, stream):
    backend.steps = [ACCEPTED, Delta(["a"]), FOREVER]
    connection = server.open(CHAT_PATH, {**HELLO, "n": 3, "stream": stream})
    wait_for(lambda: len(backend.streams) == 3 and not any(stream.steps for stream in backend.streams))
    connection.close()
    assert all(stream.cancelled.wait(5) for stream in backend.streams)


def test_a_choice_that_cannot_be_submitted_takes_the_others_back(server, backend):
    inner, calls = backend.submit, itertools.count()

    async def submit(submission):
        if next(calls):
            raise StageError("gone", code="unavailable")
        return await inner(submission)

    backend.submit = submit
    try:
        assert server.post(CHAT_PATH, {**HELLO, "n": 2}).status_code == 503
    finally:
        del backend.submit
    assert backend.streams[0].cancelled_at


# Log probabilities.


def entry(token, logprob):
    return Entry(token, list(token.encode()), logprob, [(token, list(token.encode()), logprob), ("<end>", None, -9.0)])


MARKED = [
    ACCEPTED,
    Delta(["He"], logprobs=[[entry("He", -0.5)]]),
    Delta(["llo"], "stop", 3, 2, logprobs=[[entry("llo", -0.25)]]),
]


def test_the_official_client_reads_log_probabilities(server, backend):
    backend.steps = MARKED
    with server.client() as client:
        answer = client.chat.completions.create(**HELLO, logprobs=True, top_logprobs=2)
        content = answer.choices[0].logprobs.content
        assert [(token.token, token.logprob, bytes(token.bytes)) for token in content] == [
            ("He", -0.5, b"He"),
            ("llo", -0.25, b"llo"),
        ]
        assert [(top.token, top.logprob, top.bytes) for top in content[0].top_logprobs][1] == ("<end>", -9.0, None)
        assert answer.choices[0].logprobs.refusal is None
        chunks = list(client.chat.completions.create(**HELLO, logprobs=True, top_logprobs=2, stream=True))
        streamed = [
            token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content
        ]
        assert streamed == content
        text = client.completions.create(**PROMPT, logprobs=2)
        older = text.choices[0].logprobs
        assert (older.tokens, older.token_logprobs, older.text_offset) == (["He", "llo"], [-0.5, -0.25], [0, 2])
        assert older.top_logprobs[1] == {"llo": -0.25, "<end>": -9.0}
        parts = list(client.completions.create(**PROMPT, logprobs=2, stream=True))
        offsets = [
            offset for part in parts if part.choices[0].logprobs for offset in part.choices[0].logprobs.text_offset
        ]
        assert offsets == [0, 2]
    sampling = json.loads(backend.submissions[0].sampling)
    assert (sampling["logprobs"], sampling["top_logprobs"]) == (True, 2)
