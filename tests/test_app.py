"""The gateway over real sockets: uvicorn, HTTP clients, the official one; a backend that plays scripts."""

import asyncio
import contextlib
import http.client
import itertools
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections import deque

import httpx
import openai
import orjson
import pytest
import uvicorn
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gateway import listener
from gateway.app import create_app
from gateway.backend import Delta
from gateway.protocol import CHAT, COMPLETION
from gateway.settings import Settings, SettingsError
from observability import metrics, tracing
from pipelines.errors import StageError
from pipelines.logprobs import Entry
from pipelines.pipeline import Pipeline
from pipelines.terms import Terms
from tests.otlp_receiver import Receiver

MODEL = "echo"
CHAT_PATH, COMPLETION_PATH = CHAT.path, COMPLETION.path
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]}
PROMPT = {"model": MODEL, "prompt": "Hello!"}
ACCEPTED = Delta([], prompt_tokens=3)
ANSWER = [
    ACCEPTED,
    Delta([" He"]),
    Delta(["llo"]),
    Delta([" you"], "stop", 3, 4, {"preprocess": 1.5, "generate": 20}, cached_tokens=2),
]
FOREVER = 3600.0


class ScriptedStream:
    """Plays its steps: a Delta is told, an exception raised, a number slept."""

    def __init__(self, steps):
        self.steps = deque(steps)
        self.cancelled = threading.Event()
        self.cancelled_at = 0.0

    async def next(self):
        while True:
            step = self.steps.popleft()
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, Delta):
                return step
            await asyncio.sleep(step)

    def cancel(self):
        if not self.cancelled_at:
            self.cancelled_at = time.monotonic()
            self.cancelled.set()


class ScriptedBackend:
    def __init__(self):
        self.served = {name: Pipeline(name=name, source="path:none") for name in (MODEL, "other")}
        self.reset()

    def reset(self):
        self.steps = ANSWER
        self.each = []  # the steps of the next streams, if they differ
        self.submissions = []
        self.streams = []
        self.not_ready = set()
        self.recordings = {}
        self.refusal = None

    def pipelines(self):
        return self.served

    def ready(self, pipeline):
        return pipeline not in self.not_ready

    async def submit(self, submission):
        if self.refusal:
            raise self.refusal
        self.submissions.append(submission)
        stream = ScriptedStream(self.each.pop(0) if self.each else self.steps)
        self.streams.append(stream)
        return stream

    async def recording(self, pipeline, span):
        return self.recordings.get((pipeline, span), b"")


class Server:
    def __init__(self, backend, settings, lifespan=None, keys=None):
        self.backend = backend
        app = create_app(backend, settings, lifespan, keys)
        self.uvicorn = uvicorn.Server(listener.configure(app, settings, log_level="critical", lifespan="on"))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        wait_for(lambda: self.uvicorn.started)
        return self

    def __exit__(self, *args):
        self.uvicorn.should_exit = True
        self.thread.join(5)
        assert not self.thread.is_alive()

    def post(self, path, body, **headers):
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        return httpx.post(self.url + path, content=content, headers=headers, timeout=5)

    def get(self, path):
        return httpx.get(self.url + path, timeout=5)

    def raw(self, *requests):
        """The bytes that come back for these bytes, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(b"".join(requests))
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def open(self, path, body):
        """A connection that has sent its request and read nothing."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        connection.sendall(raw_request(path, body))
        return connection

    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=5)


def wait_for(condition, timeout=5.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def raw_request(path, body, *headers):
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    lines = [f"POST {path} HTTP/1.1", "host: test", f"content-length: {len(content)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def unchunk(response):
    """The body of a chunked response, and each chunk."""
    head, _, rest = response.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    chunks = []
    while True:
        size, _, rest = rest.partition(b"\r\n")
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
        if not chunks[-1]:
            assert rest == b""
            return b"".join(chunks), chunks[:-1]


@pytest.fixture(scope="module")
def module_server():
    with Server(ScriptedBackend(), Settings()) as running:
        yield running


@pytest.fixture
def server(module_server):
    module_server.backend.reset()
    return module_server


@pytest.fixture
def backend(server):
    return server.backend


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


# How long it may take.


def test_priority_and_time_go_to_the_pipeline(server, backend):
    assert server.post(CHAT_PATH, {**HELLO, "priority": -2}, **{"x-request-timeout-ms": "5000"}).status_code == 200
    (submission,) = backend.submissions
    assert submission.terms.priority == -2
    assert 0 < submission.terms.timeout_ms <= 5000  # the rest of it
    server.post(CHAT_PATH, HELLO, **{"x-request-timeout-ms": "99999999999"})
    assert 3_599_000 < backend.submissions[1].terms.timeout_ms <= Settings().max_timeout_ms


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "1e3", "\u00b2"])
def test_a_bad_timeout_names_its_header(server, backend, value):
    response = server.raw(raw_request(CHAT_PATH, HELLO, "connection: close", f"x-request-timeout-ms: {value}"))
    assert response.startswith(b"HTTP/1.1 400")
    assert b'"param":"x-request-timeout-ms"' in response
    assert not backend.submissions


def test_time_that_is_over_in_the_queue():
    backend = ScriptedBackend()
    backend.steps = [ACCEPTED, FOREVER]
    with Server(backend, Settings(max_concurrency=1)) as server:
        running = server.open(CHAT_PATH, HELLO)
        wait_for(lambda: len(backend.streams) == 1)
        response = server.post(CHAT_PATH, HELLO, **{"x-request-timeout-ms": "20"})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        running.close()
        wait_for(lambda: backend.streams[0].cancelled_at)
        backend.steps = ANSWER
        assert server.post(CHAT_PATH, HELLO).status_code == 200  # its place in the queue is gone


# Errors.

STATUSES = [
    ("invalid_request", 400, "invalid_request_error"),
    ("unsupported_parameter", 400, "invalid_request_error"),
    ("context_length_exceeded", 400, "invalid_request_error"),
    ("overloaded", 429, "rate_limit_error"),
    ("unavailable", 503, "server_error"),
    ("timeout", 504, "server_error"),
    ("internal", 500, "server_error"),
    ("a_code_nobody_knows", 500, "server_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("code", "status", "type"), STATUSES)
def test_a_stage_error_before_the_headers(server, backend, code, status, type, stream):
    backend.steps = [StageError("It is too long.", code=code, param="messages", stage="preprocess")]
    response = server.post(CHAT_PATH, {**HELLO, "stream": stream})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["stage"]) == (status, type, "preprocess")
    assert "preprocess" in error["message"]
    assert ("retry-after" in response.headers) == (status in (429, 503))
    if status != 500:
        assert (error["code"], error["param"]) == (code, "messages")
        assert error["message"] == "It is too long. (stage: preprocess)"
    assert backend.streams[0].cancelled_at


@pytest.mark.parametrize(
    "failure",
    [
        ValueError("secret /srv/model.py"),
        StageError.from_text("secret\nAt:\n /srv/model.py(1): execute", stage="generate"),
    ],
)
def test_what_is_unexpected_is_logged_and_not_shown(server, backend, failure, caplog):
    for steps in ([failure], [ACCEPTED, failure]):
        backend.steps = steps
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            response = server.post(CHAT_PATH, {**HELLO, "stream": True}, **{"x-request-id": "find-me"})
        assert "secret" not in response.text
        assert "/srv" not in response.text
        assert "find-me" in response.text
        assert response.headers["x-request-id"] == "find-me"
        (record,) = caplog.records
        assert record.request_id == "find-me"
        assert "secret" in record.getMessage()
    assert "[DONE]" not in response.text


def test_an_error_inside_a_stream_has_no_done(server, backend):
    backend.steps = [ACCEPTED, Delta(["a"]), StageError("Too slow.", code="timeout", stage="generate")]
    body, _ = unchunk(server.raw(raw_request(CHAT_PATH, {**HELLO, "stream": True}, "connection: close")))
    *_, last = body.split(b"\n\n")[:-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "timeout"
    assert b"[DONE]" not in body
    assert backend.streams[0].cancelled_at


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/embeddings", "/v1/models/", "/v1/models/a/b", "/v1/chat/completions/"]
)
def test_an_unknown_url(server, path):
    response = server.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", CHAT_PATH), ("POST", "/v1/models"), ("DELETE", f"/v1/models/{MODEL}")]
)
def test_a_method_that_is_not_allowed(server, method, path):
    response = httpx.request(method, server.url + path)
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_supported"
    assert response.headers["allow"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}"])
def test_a_body_that_is_not_json(server, backend, body):
    response = server.post(CHAT_PATH, body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert not backend.submissions


def test_the_content_type_does_not_matter(server):
    assert server.post(CHAT_PATH, HELLO, **{"content-type": "text/plain"}).status_code == 200
    assert server.raw(raw_request(CHAT_PATH, HELLO, "connection: close")).startswith(b"HTTP/1.1 200 OK")


# Pictures.


RED = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
WHAT = {"type": "text", "text": "What is it?"}


def seeing(*parts, model="seeing", **more):
    return {"model": model, "messages": [{"role": "user", "content": [*parts]}], **more}


def picture(size):
    return {"type": "image_url", "image_url": {"url": "x" * size}}


@pytest.fixture
def sighted(sighted_server):
    sighted_server.backend.reset()
    return sighted_server


@pytest.fixture(scope="module")
def sighted_server():
    backend = ScriptedBackend()
    backend.served["seeing"] = Pipeline(name="seeing", source="path:none", max_images=2)
    with Server(backend, Settings()) as server:
        yield server


def test_image_parts_go_on_as_they_came(sighted):
    response = sighted.post(CHAT_PATH, seeing(WHAT, RED, {**RED, "image_url": {"url": "https://h/x", "detail": "low"}}))
    assert response.status_code == 200
    (submission,) = sighted.backend.submissions
    (message,) = json.loads(submission.inputs["messages"])
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "image_url"]
    assert [part["image_url"]["url"] for part in message["content"][1:]] == [RED["image_url"]["url"], "https://h/x"]
    assert [part["image_url"]["detail"] for part in message["content"][1:]] == ["auto", "low"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (seeing(WHAT, RED, model=MODEL), "messages[0].content[1].type"),
        (seeing(RED, RED, WHAT, RED), "messages[0].content[3].type"),
        (seeing(WHAT, {"type": "image_url", "image_url": {"url": "data:,", "detail": "best"}}), None),
    ],
)
def test_images_that_the_pipeline_does_not_take_are_refused_by_path(sighted, body, param):
    response = sighted.post(CHAT_PATH, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == (param or "messages[0].content[1].image_url.detail")
    assert sighted.backend.submissions == []


def test_pictures_have_room_beside_the_body(sighted):
    """What is no picture is bounded as it is without pictures: a text of megabytes would hold the tokenizer."""
    settings = Settings()
    body = seeing(picture(settings.max_image_bytes), WHAT)
    assert sighted.post(CHAT_PATH, body).status_code == 200
    text = {"type": "text", "text": "x" * settings.max_body_bytes}
    for refused in (seeing(RED, text), seeing(text), seeing(text, model=MODEL)):
        response = sighted.post(CHAT_PATH, refused)
        assert response.status_code == 413
        assert "without its pictures" in response.json()["error"]["message"]
    response = sighted.post(CHAT_PATH, seeing(picture(settings.max_image_bytes + settings.max_body_bytes)))
    assert response.status_code == 413
    assert "without" not in response.json()["error"]["message"]


def test_large_bodies_are_as_deep_as_small_ones(sighted):
    deep = b"[" * 200 + b"]" * 200
    large = b'{"model": "seeing", "x": %s, "messages": "%s"}' % (deep, b"x" * 2_000_000)
    response = sighted.post(CHAT_PATH, large)
    assert response.status_code == 400
    assert "nested" in response.json()["error"]["message"]


# The body's limit.


def test_the_limit_is_exact(server):
    def body(size):
        empty = len(orjson.dumps({**PROMPT, "prompt": ""}))
        return orjson.dumps({**PROMPT, "prompt": "x" * (size - empty)})

    limit = Settings().max_body_bytes
    assert server.post(COMPLETION_PATH, body(limit)).status_code == 200
    response = server.post(COMPLETION_PATH, body(limit + 1))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert response.headers["x-request-id"]


def test_an_announced_body_is_refused_unread(server):
    headers = "host: test\r\ncontent-length: 99999999999\r\nexpect: 100-continue"
    head = f"POST {CHAT_PATH} HTTP/1.1\r\n{headers}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_chunked_body_is_refused_while_it_is_read(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("POST", CHAT_PATH, body=(b"x" * 65536 for _ in range(40)), encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "request_too_large"
    connection.close()


# Disconnects.


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels(server, backend, stream):
    backend.steps = [ACCEPTED, Delta(["a"]), FOREVER]
    connection = server.open(CHAT_PATH, {**HELLO, "stream": stream})
    wait_for(lambda: backend.streams and len(backend.streams[0].steps) == 0)
    connection.close()
    assert backend.streams[0].cancelled.wait(5)


def test_a_client_that_leaves_while_the_server_writes(server, backend):
    backend.steps = [ACCEPTED, *[0, Delta(["x" * 100_000])] * 5000]
    connection = server.open(CHAT_PATH, {**HELLO, "stream": True})
    connection.recv(1000)
    steps = backend.streams[0].steps

    def stalled():  # the socket's buffers are full, and the server waits for this client
        left = len(steps)
        time.sleep(0.05)
        return len(steps) == left

    wait_for(stalled)
    waiting = len(steps)
    assert waiting > 0
    connection.close()
    assert backend.streams[0].cancelled.wait(5)
    assert len(steps) > waiting - 100  # it did not go on writing to nobody


def test_a_client_that_leaves_before_acceptance(server, backend):
    backend.steps = [FOREVER]
    connection = server.open(CHAT_PATH, {**HELLO, "stream": True})
    wait_for(lambda: backend.streams)
    connection.close()
    assert backend.streams[0].cancelled.wait(0.2)


def test_a_client_that_leaves_in_the_middle_of_its_body(server, backend):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(raw_request(CHAT_PATH, HELLO)[:-10])
    assert server.post(CHAT_PATH, HELLO).status_code == 200
    assert len(backend.submissions) == 1


# Connections and ids.


def test_pipelined_requests_are_answered_in_order(server, backend):
    response = server.raw(
        raw_request(CHAT_PATH, HELLO, "x-request-id: one"),
        raw_request(CHAT_PATH, {**HELLO, "stream": True}, "x-request-id: two"),
        raw_request("/v1/nope", {}, "x-request-id: three"),
        raw_request(COMPLETION_PATH, PROMPT, "x-request-id: four", "connection: close"),
    )
    order = [response.index(f"x-request-id: {name}".encode()) for name in ("one", "two", "three", "four")]
    assert order == sorted(order)
    assert response.count(b"HTTP/1.1 ") == 4
    assert len(backend.submissions) == 3


def test_a_connection_is_kept_after_every_kind_of_answer(server, backend):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.connect()
    first = connection.sock
    for path, body in [
        (CHAT_PATH, HELLO),
        (CHAT_PATH, {**HELLO, "stream": True}),
        (CHAT_PATH, {}),
        ("/x", {}),
    ]:
        connection.request("POST", path, body=orjson.dumps(body))
        connection.getresponse().read()
    assert connection.sock is first
    connection.close()


def test_one_request_id_twice_at_once(server, backend):
    backend.steps = [0.2, *ANSWER]
    responses = []
    threads = [
        threading.Thread(target=lambda: responses.append(server.post(CHAT_PATH, HELLO, **{"x-request-id": "same"})))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert [response.headers["x-request-id"] for response in responses] == ["same", "same"]
    ids = [submission.id for submission in backend.submissions]
    assert len(set(ids)) == 2
    assert all(id.startswith("same.") for id in ids)


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "h\xe9", "a\tb"])
def test_an_insane_request_id_is_replaced(server, bad):
    response = server.raw(
        raw_request("/v1/nope", {}, "connection: close").replace(
            b"host: test", f"x-request-id: {bad}".encode("latin-1")
        )
    )
    assert b"x-request-id: req_" in response


def test_every_response_has_its_id_and_timing(server):
    for path in ("/v1/models", f"/v1/models/{MODEL}", "/health/live", "/health/ready", "/metrics", "/nope"):
        response = httpx.get(server.url + path, headers={"x-request-id": "k" * 128})
        assert response.headers["x-request-id"] == "k" * 128
        assert response.headers["server-timing"].startswith("total;dur=")


# Health and metrics.


def test_ready_names_what_is_not(server, backend):
    assert server.get("/health/ready").status_code == 200
    backend.not_ready = {"other"}
    response = server.get("/health/ready")
    assert response.status_code == 503
    assert response.json()["not_ready"] == ["other"]
    assert server.get("/health/live").status_code == 200


def test_a_gateway_that_serves_nothing_is_not_ready():
    backend = ScriptedBackend()
    backend.served = {}
    with Server(backend, Settings()) as server:
        assert server.get("/health/ready").status_code == 503


def sample(name, **labels):
    return metrics.REGISTRY.get_sample_value(name, labels) or 0


def test_metrics_of_an_answer(server):
    before = sample("triptych_tokens_total", pipeline=MODEL, type="output")
    firsts = sample("gen_ai_server_time_to_first_token_seconds_count", pipeline=MODEL)
    server.post(CHAT_PATH, {**HELLO, "stream": True})
    server.post(CHAT_PATH, HELLO)
    # A request is counted once its last byte is written: the client may be here first.
    wait_for(lambda: sample("triptych_tokens_total", pipeline=MODEL, type="output") == before + 8)
    assert sample("gen_ai_server_time_to_first_token_seconds_count", pipeline=MODEL) == firsts + 2
    wait_for(lambda: sample("triptych_requests_in_flight", pipeline=MODEL) == 0)
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert (
        'gen_ai_server_request_duration_seconds_count{operation="chat",pipeline="echo",status="200"}' in response.text
    )


def test_metrics_of_a_client_that_left(server, backend):
    before = sample("triptych_requests_aborted_total", pipeline=MODEL, reason="disconnected")
    backend.steps = [ACCEPTED, FOREVER]
    server.open(CHAT_PATH, HELLO).close()
    wait_for(lambda: sample("triptych_requests_aborted_total", pipeline=MODEL, reason="disconnected") == before + 1)
    wait_for(lambda: sample("triptych_requests_in_flight", pipeline=MODEL) == 0)


def test_an_unknown_model_is_never_a_label(server):
    server.post(CHAT_PATH, {**HELLO, "model": "invented-by-a-client"})
    assert "invented-by-a-client" not in server.get("/metrics").text


# Traces.


@pytest.fixture
def receiver(monkeypatch):
    with Receiver() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.endpoint)
        tracing.configure("triptych-gateway")
        yield running
        tracing.shutdown()


TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_stream_is_one_trace(server, backend, receiver):
    body = {
        **HELLO,
        "stream": True,
        "temperature": 0.5,
        "max_tokens": 9,
        "seed": 1,
        "stop": ["x"],
        "metadata": {"a": "b"},
    }
    server.post(CHAT_PATH, body, **{"x-request-id": "traced", "traceparent": f"00-{TRACE}-{CALLER}-01"})
    root = receiver.tree(TRACE, expect={f"POST {CHAT_PATH}"}, remote_parent=CALLER)
    assert root.names() == [f"POST {CHAT_PATH}", "admission", f"chat {MODEL}", "sse.write"]
    assert [child.name for child in root.children] == ["admission", f"chat {MODEL}", "sse.write"]
    assert root.kind == "server"
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["http.route"] == root.attributes["url.path"] == CHAT_PATH
    assert root.attributes["triptych.request_id"] == "traced"
    chat = root.find(f"chat {MODEL}")
    assert chat.kind == "client"
    assert backend.submissions[0].traceparent == f"00-{TRACE}-{chat.span_id}-01"
    wanted = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "triptych",
        "gen_ai.request.model": MODEL,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 1,
        "gen_ai.request.stop_sequences": ["x"],
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "triptych.metadata.a": "b",
    }
    assert {key: chat.attributes[key] for key in wanted} == wanted
    assert chat.attributes["gen_ai.response.id"].startswith("chatcmpl-")
    assert 0 < chat.attributes["gen_ai.response.time_to_first_chunk"] < 5
    assert root.find("sse.write").attributes["triptych.sse.events"] == 3
    assert root.find("admission").attributes["triptych.queue.depth"] == 0
    assert not any(span.error is not None for span in root.walk())


def test_the_stages_of_two_choices_are_in_the_trace(server, backend, receiver):
    server.post(CHAT_PATH, {**HELLO, "n": 3}, traceparent=f"00-{TRACE}-{CALLER}-01")
    root = receiver.tree(TRACE, expect={f"POST {CHAT_PATH}"}, remote_parent=CALLER)
    chat = root.find(f"chat {MODEL}")
    assert chat.attributes["gen_ai.request.choice.count"] == 3
    assert chat.attributes["gen_ai.response.finish_reasons"] == ["stop"] * 3
    assert (chat.attributes["gen_ai.usage.input_tokens"], chat.attributes["gen_ai.usage.output_tokens"]) == (3, 12)
    assert chat.attributes["gen_ai.usage.cache_read.input_tokens"] == 2
    parent = f"00-{TRACE}-{chat.span_id}-01"
    assert [submission.traceparent for submission in backend.submissions] == [parent, parent, None]


def test_a_failed_request_says_so_in_its_trace(server, backend, receiver):
    failure = StageError("no", code="unavailable", stage="generate")
    for steps, status, stream in (([failure], 503, False), ([ACCEPTED, failure], 200, True)):
        trace = f"{status:032x}"
        backend.steps = steps
        server.post(CHAT_PATH, {**HELLO, "stream": stream}, traceparent=f"00-{trace}-{CALLER}-01")
        root = receiver.tree(trace, expect={f"POST {CHAT_PATH}"}, remote_parent=CALLER)
        assert root.attributes["http.response.status_code"] == status
        assert root.attributes["error.type"] == root.find(f"chat {MODEL}").attributes["error.type"] == "unavailable"
        assert root.error is not None


def test_a_bad_request_is_not_the_servers_error(server, receiver):
    server.post(CHAT_PATH, {}, traceparent=f"00-{TRACE}-{CALLER}-01")
    root = receiver.tree(TRACE, expect={f"POST {CHAT_PATH}"}, remote_parent=CALLER)
    assert root.error is None
    assert root.attributes["error.type"] == "invalid_request"
    assert root.attributes["http.response.status_code"] == 400


def test_a_client_that_left_in_its_trace(server, backend, receiver):
    backend.steps = [ACCEPTED, FOREVER]
    request = raw_request(CHAT_PATH, {**HELLO, "stream": True}, f"traceparent: 00-{TRACE}-{CALLER}-01")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request)
        connection.recv(100)
    root = receiver.tree(TRACE, expect={f"POST {CHAT_PATH}"}, remote_parent=CALLER)
    assert root.attributes["error.type"] == "disconnected"
    assert root.find("sse.write").attributes["triptych.sse.disconnected"] is True


def test_an_unsampled_request_sends_no_traceparent(server, backend, receiver):
    server.post(CHAT_PATH, HELLO, traceparent=f"00-{TRACE}-{CALLER}-00")
    assert backend.submissions[0].traceparent is None


# Admission.


def test_one_over_the_queue_is_refused():
    backend = ScriptedBackend()
    backend.steps = [ACCEPTED, FOREVER]
    with Server(backend, Settings(max_concurrency=1, max_queue=1)) as server:
        running = server.open(CHAT_PATH, HELLO)
        wait_for(lambda: len(backend.streams) == 1)
        queued = server.open(CHAT_PATH, HELLO)
        wait_for(lambda: sample("triptych_requests_queued", pipeline=MODEL) == 1)
        response = server.post(CHAT_PATH, HELLO)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "overloaded"
        assert len(backend.streams) == 1
        running.close()  # its place goes to the one that waits
        wait_for(lambda: len(backend.streams) == 2)
        waiting = server.open(CHAT_PATH, HELLO)
        wait_for(lambda: sample("triptych_requests_queued", pipeline=MODEL) == 1)
        waiting.close()  # one that leaves the queue frees its place in it
        wait_for(lambda: sample("triptych_requests_queued", pipeline=MODEL) == 0)
        queued.close()
        wait_for(lambda: backend.streams[1].cancelled_at)
        backend.steps = ANSWER
        assert server.post(CHAT_PATH, HELLO).status_code == 200


def test_choices_are_admitted_together():
    backend = ScriptedBackend()
    backend.steps = [ACCEPTED, FOREVER]
    with Server(backend, Settings(max_concurrency=4)) as server:
        first = server.open(CHAT_PATH, {**HELLO, "n": 3})
        wait_for(lambda: len(backend.streams) == 3)
        second = server.open(CHAT_PATH, {**HELLO, "n": 2})
        wait_for(lambda: sample("triptych_requests_queued", pipeline=MODEL) == 1)
        assert len(backend.streams) == 3
        first.close()
        wait_for(lambda: len(backend.streams) == 5)
        second.close()
        backend.steps = ANSWER
        assert len(server.post(CHAT_PATH, {**HELLO, "n": 9}).json()["choices"]) == 9  # alone, it is let in


# The app and its settings.


def test_the_lifespan_surrounds_the_requests():
    seen = []

    @contextlib.asynccontextmanager
    async def lifespan():
        seen.append("start")
        yield
        seen.append("stop")

    with Server(ScriptedBackend(), Settings(), lifespan) as server:
        assert seen == ["start"]
        assert server.get("/health/live").status_code == 200
    assert seen == ["start", "stop"]


def test_settings_come_from_the_environment():
    settings = Settings.from_env({"TRIPTYCH_PORT": "81", "TRIPTYCH_TRITON_GRPC": "triton:8001", "TRIPTYCH_HOST": ""})
    assert settings == Settings(port=81, triton_grpc="triton:8001")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("PORT", "70000"),
        ("PORT", "http"),
        ("TRITON_GRPC", "localhost"),
        ("TRITON_GRPC", ":8001"),
        ("TRITON", "a:8001,b"),
        ("TRITON", "a:8001, a:8001"),
        ("MAX_BODY_BYTES", "0"),
        ("MAX_BODY_MEMORY_BYTES", "1000"),
        ("MAX_CONCURRENCY", "0"),
        ("MAX_QUEUE", "-1"),
        ("MAX_CHOICES", "0"),
        ("MAX_TIMEOUT_MS", "0"),
        ("KEY_REQUESTS_PER_MINUTE", "-1"),
        ("KEY_CONCURRENCY", "-1"),
        ("CORS_ORIGINS", "https://a.example/path"),
        ("TLS_KEY", "/without/a/certificate"),
        ("MAX_CONNECTIONS", "0"),
        ("MAX_HEADER_BYTES", "100"),
        ("HEADER_TIMEOUT_S", "0"),
        ("BODY_TIMEOUT_S", "0"),
        ("WRITE_TIMEOUT_S", "0"),
        ("IDLE_TIMEOUT_S", "0"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_a_bad_setting_names_its_key(key, value):
    with pytest.raises(SettingsError, match=f"TRIPTYCH_{key}"):
        Settings.from_env({f"TRIPTYCH_{key}": value})


# Anything at all.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
bodies = st.builds(
    lambda base, changes: {**base, **changes},
    st.sampled_from([HELLO, PROMPT, {}]),
    st.dictionaries(
        st.sampled_from(sorted(CHAT.parameters | {"prompt", "n"})) | st.text(max_size=8),
        json_values,
        max_size=4,
    ),
)


@given(body=bodies | json_values, path=st.sampled_from([CHAT_PATH, COMPLETION_PATH]))
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_json_makes_a_500(server, client, body, path):
    response = client.post(server.url + path, content=json.dumps(body).encode())
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"]
        assert error["type"] == "invalid_request_error"


@given(body=st.binary(max_size=200))
@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_make_a_500(server, client, body):
    assert client.post(server.url + CHAT_PATH, content=body).status_code == 400


@pytest.fixture
def client():
    with httpx.Client(timeout=5) as running:
        yield running


def test_the_gateway_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'tokenizers', 'numpy'}"
    code = f"import sys, gateway.app; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.strip() == "[]"
