"""Time that is over, errors, and bodies that are not taken; a backend that plays scripts."""

import json
import logging

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gateway.backend import Delta
from gateway.protocol import CHAT
from gateway.settings import Settings
from pipelines.errors import StageError
from tests.scripted import (
    ACCEPTED,
    ANSWER,
    CHAT_PATH,
    COMPLETION_PATH,
    FOREVER,
    HELLO,
    MODEL,
    PROMPT,
    ScriptedBackend,
    Server,
    raw_request,
    unchunk,
    wait_for,
)

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
