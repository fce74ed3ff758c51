"""Traces over HTTP: listed, shown and withheld; each request's is kept, for the right reason."""

from __future__ import annotations

import os
import re
import time

import pytest
from starlette.testclient import TestClient

from gateway.app import create_app
from gateway.kept import Kept
from gateway.settings import Settings, SettingsError
from observability import tracing
from observability.completeness import GATEWAY, check
from observability.encoded import decode
from observability.keeping import Traces
from observability.ring import Ring
from observability.spans import SpanData, read_document
from pipelines.errors import StageError
from tests.scripted import ACCEPTED, CHAT_PATH, HELLO, MODEL, ScriptedBackend

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exported() -> list[SpanData]:
    return []


@pytest.fixture
def traces(monkeypatch, exported):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    traces = Traces(Ring(100, 1_000_000), lambda service, encoded: exported.append(decode(encoded, service)))
    tracing.configure("triptych-gateway", traces.take)
    yield traces
    tracing.shutdown()


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


def client_of(backend, traces, address="127.0.0.1", url="http://127.0.0.1:8080") -> TestClient:
    app = create_app(backend, Settings(), traces=traces)
    return TestClient(app, base_url=url, client=(address, 50000))


@pytest.fixture
def client(backend, traces):
    with client_of(backend, traces) as client:
        yield client


def test_a_request_is_listed_and_shown(client):
    asked = client.post(CHAT_PATH, json={**HELLO, "stream": True}, headers={"x-request-id": "a/b?c"})
    assert asked.status_code == 200
    (listed,) = client.get("/admin/traces").json()["data"]
    assert listed == {
        **listed,
        "request_id": "a/b?c",
        "pipeline": MODEL,
        "operation": "chat",
        "status": 200,
        "reason": None,
        "kept": "recent",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", listed["started"])
    assert 0 < listed["duration_ms"] < 60_000
    shown = {id: client.get(f"/admin/traces/{id}") for id in (listed["id"], "a%2Fb%3Fc", listed["span_id"])}
    for answer in shown.values():
        spans = read_document(answer.content)
        assert check(spans, expect={*GATEWAY, f"chat {MODEL}", "sse.write"}) == []
        assert spans[0].span_id == listed["span_id"]
    assert client.get("/admin/traces/a%2Fb%3Fc/usual").json() == {"pipeline": MODEL, "requests": 0, "stages_ms": {}}


def test_requests_of_one_callers_trace_are_told_apart(client):
    for number in range(3):
        client.post(
            CHAT_PATH, json=HELLO, headers={"traceparent": f"00-{TRACE}-{CALLER}-00", "x-request-id": f"{number}"}
        )
    together = read_document(client.get(f"/admin/traces/{TRACE}").content)
    alone = read_document(client.get("/admin/traces/1").content)
    assert len(together) == 3 * len(alone)
    assert check(alone, remote_parent=CALLER, expect=GATEWAY) == []
    listed = client.get("/admin/traces?limit=2").json()["data"]
    assert [entry["request_id"] for entry in listed] == ["2", "1"]
    usual = client.get("/admin/traces/1/usual").json()
    assert (usual["requests"], list(usual["stages_ms"])) == (2, ["admission"])


def test_why_a_trace_is_kept(client, backend, exported):
    client.post(CHAT_PATH, json={**HELLO, "temperature": -1})
    failure = StageError("no", code="unavailable", stage="generate")
    backend.steps = [failure]
    client.post(CHAT_PATH, json=HELLO)
    backend.steps = [ACCEPTED, failure]
    client.post(CHAT_PATH, json={**HELLO, "stream": True})
    client.post(CHAT_PATH, json=HELLO, headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
    backend.reset()
    client.post(CHAT_PATH, json=HELLO, headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
    listed = client.get("/admin/traces").json()["data"]
    assert [(entry["status"], entry["kept"]) for entry in reversed(listed)] == [
        (400, "recent"),
        (503, "failed"),
        (503, "failed"),
        (503, "failed"),
        (200, "sampled"),
    ]
    assert {span.trace_id for span in exported} == {
        entry["id"] for entry in listed[2:4]
    }  # the sampled export themselves
    assert all(not span.sampled for span in exported)


def test_a_failed_streams_span_says_so(client, backend):
    backend.steps = [ACCEPTED, StageError("no", code="unavailable", stage="generate")]
    client.post(CHAT_PATH, json={**HELLO, "stream": True}, headers={"x-request-id": "broke"})
    spans = read_document(client.get("/admin/traces/broke").content)
    assert check(spans) == []
    failed = {span.name: span for span in spans if span.error is not None}
    assert set(failed) == {f"POST {CHAT_PATH}", f"chat {MODEL}"}
    assert failed[f"chat {MODEL}"].attributes["error.type"] == "unavailable"
    assert failed[f"POST {CHAT_PATH}"].attributes["http.response.status_code"] == 200


def test_http_conventions_are_on_the_server_span(client):
    client.post(CHAT_PATH, json=HELLO, headers={"x-request-id": "http", "user-agent": "x" * 999})
    root = read_document(client.get("/admin/traces/http").content)[0]
    wanted = {
        "http.request.method": "POST",
        "http.route": CHAT_PATH,
        "http.response.status_code": 200,
        "url.scheme": "http",
        "client.address": "127.0.0.1",
        "network.protocol.version": "1.1",
        "user_agent.original": "x" * 256,
    }
    assert {key: root.attributes.get(key) for key in wanted} == wanted


def test_a_retry_is_one_more_request_of_the_callers_trace_and_says_so(client, backend):
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
    backend.steps = [StageError("no", code="unavailable", stage="generate")]
    client.post(CHAT_PATH, json=HELLO, headers={**headers, "x-stainless-retry-count": "0", "x-request-id": "try"})
    backend.reset()
    client.post(CHAT_PATH, json=HELLO, headers={**headers, "x-stainless-retry-count": "1", "x-request-id": "retry"})
    for id, count in (("try", None), ("retry", 1)):
        spans = read_document(client.get(f"/admin/traces/{id}").content)
        assert check(spans, remote_parent=CALLER, expect=GATEWAY) == []
        assert spans[0].attributes.get("http.request.resend_count") == count
    client.post(CHAT_PATH, json=HELLO, headers={"x-stainless-retry-count": "-1", "x-request-id": "odd"})
    odd = read_document(client.get("/admin/traces/odd").content)[0]
    assert "http.request.resend_count" not in odd.attributes


@pytest.mark.parametrize("stream", [True, False])
def test_what_was_said_is_in_the_trace_only_by_opt_in(client, monkeypatch, stream):
    client.post(CHAT_PATH, json={**HELLO, "stream": stream}, headers={"x-request-id": "quiet"})
    said = HELLO["messages"][0]["content"]
    assert said not in client.get("/admin/traces/quiet").text
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    client.post(CHAT_PATH, json={**HELLO, "stream": stream, "n": 2}, headers={"x-request-id": "loud"})
    (chat,) = [
        span for span in read_document(client.get("/admin/traces/loud").content) if span.name.startswith("chat ")
    ]
    assert said in chat.attributes["gen_ai.input.messages"]
    answer = client.post(CHAT_PATH, json=HELLO).json()["choices"][0]["message"]["content"]
    assert chat.attributes["gen_ai.output.messages"].count(f'"content":"{answer}"') == 2
    assert chat.attributes["gen_ai.output.messages"].count('"finish_reason":"stop"') == 2


def test_a_recording_is_given_by_the_span_of_the_request(backend, traces):
    app = create_app(backend, Settings(record=1), traces=traces)
    with TestClient(app, base_url="http://127.0.0.1:8080", client=("127.0.0.1", 50000)) as client:
        client.post(CHAT_PATH, json=HELLO, headers={"x-request-id": "it"})
        refused = client.get("/admin/traces/it/recording")
        assert (refused.status_code, "refused before generate" in refused.text) == (404, True)
        (chat,) = [
            span for span in read_document(client.get("/admin/traces/it").content) if span.name.startswith("chat ")
        ]
        backend.recordings[MODEL, f"{chat.trace_id}-{chat.span_id}"] = b"the file"
        for id in ("it", chat.trace_id):
            assert client.get(f"/admin/traces/{id}/recording").content == b"the file"
        assert client.get("/admin/traces/other/recording").status_code == 404
        assert client.get("/admin/traces/it/recording", headers={"via": "a proxy"}).status_code == 403


def test_nothing_is_recorded_unless_it_is_set(client):
    client.post(CHAT_PATH, json=HELLO, headers={"x-request-id": "it"})
    refused = client.get("/admin/traces/it/recording")
    assert (refused.status_code, "TRIPTYCH_RECORD=" in refused.text) == (404, True)


def test_what_is_not_kept_is_not_found(client):
    for id in ("a" * 32, "req_gone"):
        refused = client.get(f"/admin/traces/{id}")
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "id")
        assert client.get(f"/admin/traces/{id}/usual").json()["requests"] == 0
    assert client.get("/admin/traces?limit=-1").status_code == 400
    assert client.get("/admin/traces").json() == {"object": "list", "data": []}


@pytest.mark.parametrize(
    ("address", "url", "headers", "status"),
    [
        ("127.0.0.1", "http://localhost:8080", {}, 200),
        ("::1", "http://[::1]:8080", {}, 200),
        ("127.9.9.9", "http://127.0.0.1", {}, 200),
        ("10.0.0.1", "http://127.0.0.1:8080", {}, 403),
        ("127.0.0.1", "http://rebound.example:8080", {}, 403),  # a web page, by a name of its own for this machine
        ("127.0.0.1", "http://127.0.0.1", {"x-forwarded-for": "10.0.0.1"}, 403),  # a proxy speaks for somebody
        ("testclient", "http://127.0.0.1", {}, 403),
    ],
)
def test_only_this_machine_sees_traces(backend, traces, address, url, headers, status):
    with client_of(backend, traces, address, url) as client:
        for path in ("/admin/traces", "/admin/traces/x", "/admin/traces/x/usual"):
            assert client.get(path, headers=headers).status_code in ({status} if status == 403 else {200, 404})


def test_without_a_ring_there_are_none(backend):
    with client_of(backend, None) as client:
        assert client.post(CHAT_PATH, json=HELLO).status_code == 200
        refused = client.get("/admin/traces")
        assert (refused.status_code, "TRIPTYCH_TRACE_RING" in refused.text) == (404, True)


def test_the_settings_turn_it_off_and_bound_it(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv(tracing.SOCKET, raising=False)
    off = Kept(Settings(trace_ring=0))
    assert (off.traces, tracing.start("a", kind="server")) == (None, tracing.NO_SPAN)
    off.close()
    kept = Kept(Settings(trace_ring=2))
    try:
        sender_path = os.environ[tracing.SOCKET]
        assert sender_path.startswith(str(tmp_path))
        with tracing.start("a", kind="server") as span:
            assert span.trace_id
        assert [decode(held.encoded, held.service).name for held in kept.traces.ring.spans(span.trace_id)] == ["a"]
    finally:
        kept.close()
    assert tracing.SOCKET not in os.environ
    for setting in ({"trace_ring": -1}, {"trace_ring_mb": 0}, {"trace_slow_ms": -1}, {"trace_deep": 2}, {"record": -1}):
        with pytest.raises(SettingsError, match=f"TRIPTYCH_{next(iter(setting)).upper()}"):
            Settings(**setting)


def test_a_folder_that_cannot_be_used_costs_the_stages_spans_alone(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "gone"))
    kept = Kept(Settings())
    assert kept.traces is not None
    assert ["the stages' spans are not kept" in record.message for record in caplog.records] == [True]
    kept.close()


def test_a_trace_just_ended_is_waited_for(client):
    """The stages' last spans come a little after the answer's last byte."""
    client.post(CHAT_PATH, json=HELLO, headers={"x-request-id": "now"})
    ended = time.time()
    client.get("/admin/traces/now")
    assert time.time() - ended > 0.1
