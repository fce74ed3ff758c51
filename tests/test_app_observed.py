"""What an operator sees of requests: health, metrics, traces; a backend that plays scripts."""

import socket

import pytest

from gateway.settings import Settings
from observability import tracing
from pipelines.errors import StageError
from tests.otlp_receiver import Receiver
from tests.scripted import (
    ACCEPTED,
    CHAT_PATH,
    FOREVER,
    HELLO,
    MODEL,
    ScriptedBackend,
    Server,
    raw_request,
    sample,
    wait_for,
)

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
