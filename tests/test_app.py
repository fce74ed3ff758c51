"""What clients are answered: uvicorn, HTTP clients, the official one; a backend that plays scripts."""

import json
import time

import openai
import pytest

from gateway.backend import Delta
from pipelines.errors import StageError
from pipelines.terms import Terms
from tests.scripted import (
    ACCEPTED,
    ANSWER,
    CHAT_PATH,
    COMPLETION_PATH,
    FOREVER,
    HELLO,
    MODEL,
    PROMPT,
    raw_request,
    unchunk,
)

# Whole answers.


def test_a_chat(server, backend):
    response = server.post(CHAT_PATH, {**HELLO, "temperature": 0, "stop": "x"}, **{"x-request-id": "abc-1"})
    assert response.status_code == 200
    answer = response.json()
    assert answer["id"].startswith("chatcmpl-")
    assert abs(answer["created"] - time.time()) < 5
    assert (answer["object"], answer["model"]) == ("chat.completion", MODEL)
    assert answer["choices"][0]["message"]["content"] == " Hello you"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert response.headers["x-request-id"] == "abc-1"
    timing = response.headers["server-timing"]
    assert "preprocess;dur=1.5" in timing
    assert "generate;dur=20.0" in timing
    assert "admission;dur=" in timing
    assert timing.endswith(f"total;dur={timing.rpartition('=')[2]}")
    (submission,) = backend.submissions
    assert submission.pipeline == MODEL
    assert submission.id.startswith("abc-1.")
    assert json.loads(submission.inputs["messages"]) == HELLO["messages"]
    assert json.loads(submission.sampling) == {"temperature": 0, "stop": ["x"]}
    assert submission.traceparent is None
    assert submission.terms == Terms()


def test_a_completion_cut_by_length(server, backend):
    backend.steps = [ACCEPTED, Delta(["abc"], "length", 3, 16)]
    answer = server.post(COMPLETION_PATH, PROMPT).json()
    assert answer["choices"] == [{"text": "abc", "index": 0, "logprobs": None, "finish_reason": "length"}]
    assert backend.submissions[0].inputs == {"text": "Hello!"}
    assert json.loads(backend.submissions[0].sampling)["max_tokens"] == 16


# Streams, as bytes.


def test_a_stream_byte_for_byte(server, backend):
    backend.steps = [ACCEPTED, 0.05, Delta(["a", "b"]), 0.05, Delta(["c"], "stop", 3, 3)]
    response = server.raw(raw_request(CHAT_PATH, {**HELLO, "stream": True}, "connection: close", "x-request-id: bytes"))
    head = response.partition(b"\r\n\r\n")[0].decode().lower()
    assert "content-type: text/event-stream; charset=utf-8" in head
    assert "x-request-id: bytes" in head
    assert "server-timing: admission;dur=" in head
    body, chunks = unchunk(response)
    first = json.loads(body.split(b"\n\n")[0].removeprefix(b"data: "))
    start = f'data: {{"id":"{first["id"]}","object":"chat.completion.chunk","created":{first["created"]},'
    start += '"model":"echo","choices":[{"index":0,"delta":'
    end = ',"logprobs":null,"finish_reason":null}]}\n\n'
    expected = [
        f'{start}{{"role":"assistant","content":""}}{end}',
        f'{start}{{"content":"a"}}{end}{start}{{"content":"b"}}{end}',
        f'{start}{{"content":"c"}}{end}{start}{{}}{end}data: [DONE]\n\n',
    ]
    expected[2] = '"finish_reason":"stop"'.join(expected[2].rsplit('"finish_reason":null', 1))
    assert [chunk.decode() for chunk in chunks] == expected  # a delta is one write


@pytest.mark.parametrize("options", [{"include_timing": True}, {"include_timing": True, "include_usage": False}])
def test_a_stream_tells_its_stages_if_asked(server, options):
    """By the names of Server-Timing, in the usage's chunk, which it brings along."""
    with server.client() as client:
        *chunks, last = client.chat.completions.create(**HELLO, stream=True, stream_options=options)
    assert not any(hasattr(chunk, "timing") for chunk in chunks)
    assert last.usage.total_tokens == 7
    timing = last.timing
    assert list(timing) == ["admission", "preprocess", "generate", "total"]
    assert (timing["preprocess"], timing["generate"]) == (1.5, 20)
    assert 0 <= timing["admission"] <= timing["total"]
    names = [part.split(";")[0] for part in server.post(CHAT_PATH, HELLO).headers["server-timing"].split(", ")]
    assert [name for name in names if name in timing] == list(timing)


def test_headers_wait_for_acceptance_but_not_for_text(server, backend):
    backend.steps = [ACCEPTED, FOREVER]
    with server.open(CHAT_PATH, {**HELLO, "stream": True}) as connection:
        data = b""
        while b"\n\n" not in data.partition(b"\r\n\r\n")[2]:
            data += connection.recv(65536)
        assert b'"role":"assistant"' in data


# The official client.


def test_the_official_client_chats(server):
    with server.client() as client:
        answer = client.chat.completions.create(**HELLO)
        assert answer.choices[0].message.content == " Hello you"
        assert answer.usage.total_tokens == 7
        assert answer._request_id.startswith("req_")
        text = client.completions.create(**PROMPT)
        assert text.choices[0].text == " Hello you"


@pytest.mark.parametrize("include_usage", [False, True])
def test_the_official_client_streams(server, include_usage):
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    with server.client() as client:
        chunks = list(client.chat.completions.create(**HELLO, stream=True, **options))
        *parts, last = [chunk for chunk in chunks if chunk.choices]
        assert "".join(part.choices[0].delta.content for part in parts) == " Hello you"
        assert parts[0].choices[0].delta.role == "assistant"
        assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("stop", None)
        assert len({chunk.id for chunk in chunks}) == 1
        usages = [chunk.usage for chunk in chunks if chunk.usage]
        assert [usage.total_tokens for usage in usages] == ([7] if include_usage else [])
        assert bool(chunks[-1].choices) is not include_usage
        texts = list(client.completions.create(**PROMPT, stream=True, **options))
        assert "".join(chunk.choices[0].text for chunk in texts if chunk.choices) == " Hello you"


def test_the_official_client_lists_models(server):
    with server.client() as client:
        assert [model.id for model in client.models.list()] == [MODEL, "other"]
        assert client.models.retrieve(MODEL).owned_by == "triptych"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("no/such")


def test_the_official_client_raises_typed_errors(server, backend):
    with server.client() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(**HELLO, reasoning_effort="low")
        assert (bad.value.param, bad.value.code) == ("reasoning_effort", "unsupported_parameter")
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(**{**HELLO, "model": "nope"})
        assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
        backend.refusal = StageError("full", code="overloaded")
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**HELLO)
        backend.refusal = StageError("gone", code="unavailable")
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(**HELLO, stream=True)


def test_the_official_client_raises_inside_a_stream(server, backend):
    backend.steps = [
        ACCEPTED,
        Delta(["a"]),
        StageError("The engine has gone.", code="unavailable", stage="generate"),
    ]
    with server.client() as client:
        chunks = client.chat.completions.create(**HELLO, stream=True)
        assert [next(chunks).choices[0].delta.content for _ in range(2)] == ["", "a"]
        with pytest.raises(openai.APIError) as caught:
            next(chunks)
    assert caught.value.code == "unavailable"
    assert "generate" in caught.value.message


def test_a_stream_that_is_lost_before_its_first_text_goes_on_with_another(server, backend):
    """Its headers and who speaks have gone out: the client sees one answer, that took a little longer."""
    backend.each = [[ACCEPTED, 0.05, StageError("gone", code="unavailable", stage="generate")], ANSWER]
    response = server.post(CHAT_PATH, {**HELLO, "stream": True})
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", " He", "llo", " you", None]
    assert response.text.endswith("data: [DONE]\n\n")
    assert [stream.cancelled.wait(5) for stream in backend.streams] == [True, True]


def test_a_lost_choice_is_asked_again_and_the_others_are_not(server, backend):
    lost = StageError("gone", code="unhealthy", stage="generate")
    backend.each = [ANSWER, [ACCEPTED, Delta(["half"]), lost], ANSWER]
    response = server.post(CHAT_PATH, {**HELLO, "n": 2})
    assert [choice["message"]["content"] for choice in response.json()["choices"]] == [" Hello you"] * 2
    first, second, again = [submission.id for submission in backend.submissions]
    assert again == f"{second}.1" != first
