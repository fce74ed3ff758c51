"""Spans reach a collector whole, cost nothing when off, and never disturb what they watch."""

from __future__ import annotations

import gzip
import json
import logging
import os
import ssl
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from observability import tracing
from observability.encoded import decode, encode
from observability.sampling import sampler
from tests.otlp_receiver import BrokenTrace, ReceivedSpan, Receiver, build_tree
from tests.test_listener import certificate

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{CALLER}-01"
MALFORMED = [
    "",
    "hello",
    SAMPLED[:-1],
    SAMPLED.upper().replace("00-", "00-"),
    SAMPLED + "-more",  # version 00 has four fields
    "ff" + SAMPLED[2:],  # a forbidden version
    f"00-{'0' * 32}-{CALLER}-01",
    f"00-{TRACE}-{'0' * 16}-01",
]


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    yield
    tracing.shutdown()


@pytest.fixture
def receiver(monkeypatch):
    with Receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield receiver
        tracing.shutdown()  # while there is still a collector to take the rest


class Collected(list):
    """The spans that a recorder collected."""

    def __call__(self, trace_id: str, service: str, sampled: bool, encoded: bytes) -> None:
        span = decode(encoded, service)
        assert (span.trace_id, span.sampled) == (trace_id, sampled)
        self.append(span)


def test_off_without_an_endpoint_and_the_sdk_is_not_imported():
    code = (
        "import sys\n"
        "from observability import tracing\n"
        "assert tracing.configure('triptych') is False\n"
        "span = tracing.start('a', kind='server')\n"
        "assert span is tracing.start('b', parent=span) is tracing.record('c', span, 1, 2)\n"
        "assert span.traceparent is span.trace_id is span.span_id is None\n"
        "with span: span.set({'a': 1}); span.error('x'); span.end()\n"
        "assert tracing.flush() and tracing.stats() == {'ended': 0, 'exported': 0, 'failed': 0}\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", code], check=True, env=clean, timeout=30)


@pytest.mark.parametrize(("name", "value"), [("OTEL_SDK_DISABLED", "TRUE"), ("OTEL_TRACES_EXPORTER", "none")])
def test_the_standard_switches_turn_it_off(receiver, monkeypatch, name, value):
    assert tracing.modules(os.environ) == ("observability.otlp",)
    monkeypatch.setenv(name, value)
    assert not tracing.configure("triptych")
    assert not tracing.modules(os.environ)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "http/protobuf"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "gzip, deflate or none"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "127.0.0.1:4318", "http://"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon", "a number above 0"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1", "OTEL_BSP_MAX_QUEUE_SIZE=-1"),
    ],
)
def test_what_it_cannot_do_is_one_warning_with_the_remedy(receiver, monkeypatch, caplog, name, value, remedy):
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        assert not tracing.configure("triptych")
    assert [remedy in record.message for record in caplog.records] == [True]


def test_a_trace_of_two_services_is_one_tree(receiver):
    assert tracing.configure("triptych")
    with tracing.start("POST /v1/chat/completions", kind="server", attributes={"a": 1, "none": None}) as root:
        with tracing.start("chat m", kind="client", parent=root) as chat:
            now = tracing.now_ns()
            generate = tracing.record("generate", chat.traceparent, now, now + 1000, {"tokens": 3})
            tracing.record("decode", generate, now, now + 500, {"gaps": [1, 2]})
        root.set({"http.response.status_code": 200, "x": None})
    tree = receiver.tree(root.trace_id, expect={"POST /v1/chat/completions", "decode"})
    assert tree.names() == ["POST /v1/chat/completions", "chat m", "generate", "decode"]
    assert (tree.kind, tree.find("chat m").kind, tree.find("decode").kind) == ("server", "client", "internal")
    assert tree.attributes == {"a": 1, "http.response.status_code": 200}
    assert tree.find("decode").attributes == {"gaps": [1, 2]}
    assert tree.service == "triptych"
    assert tree.find("generate").end_ns - tree.find("generate").start_ns == 1000
    assert tracing.flush()
    assert tracing.stats() == {"ended": 4, "exported": 4, "failed": 0}


def test_a_stage_under_a_gateway_with_the_users_service_name(receiver, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    for name, wanted in [
        ("triptych", "shop"),
        ("triptych-gateway", "shop"),
        ("triptych-generate", "shop-generate"),
    ]:
        assert tracing.configure(name)
        with tracing.start("a", kind="server") as span:
            pass
        tracing.flush()
        assert receiver.tree(span.trace_id).service == wanted


def test_a_caller_outside_is_the_parent(receiver):
    tracing.configure("triptych")
    with tracing.start("POST /", kind="server", parent=SAMPLED) as span:
        assert span.trace_id == TRACE
        assert span.traceparent == f"00-{TRACE}-{span.span_id}-01"
    with pytest.raises(BrokenTrace, match="orphan"):
        receiver.tree(TRACE, timeout=0.3)
    assert receiver.tree(TRACE, remote_parent=CALLER).parent_id == CALLER


@pytest.mark.parametrize("malformed", MALFORMED)
def test_a_malformed_traceparent_is_ignored(receiver, malformed):
    tracing.configure("triptych")
    with tracing.start("root", kind="server", parent=malformed) as root:
        assert root.trace_id not in (None, TRACE)
    assert tracing.start("stage", parent=malformed) is tracing.NO_SPAN


def test_a_later_version_may_have_more_fields(receiver):
    tracing.configure("triptych")
    assert tracing.start("a", kind="server", parent=f"01-{TRACE}-{CALLER}-01-more").trace_id == TRACE


def test_only_a_server_span_starts_a_trace_and_unsampled_means_nothing(receiver):
    tracing.configure("triptych")
    assert tracing.start("stage") is tracing.NO_SPAN
    assert tracing.start("chat", kind="client", parent=tracing.NO_SPAN) is tracing.NO_SPAN
    assert tracing.start("POST /", kind="server", parent=SAMPLED[:-1] + "0") is tracing.NO_SPAN
    assert tracing.start("stage", parent=SAMPLED[:-1] + "0") is tracing.NO_SPAN


def test_the_sampler_is_the_standard_variable(receiver, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    tracing.configure("triptych")
    assert tracing.start("POST /", kind="server") is tracing.NO_SPAN
    assert tracing.start("POST /", kind="server", parent=SAMPLED).trace_id == TRACE


@pytest.mark.parametrize(
    ("name", "argument", "root", "under_sampled", "under_unsampled"),
    [
        ("", "", True, True, False),
        ("always_on", "", True, True, True),
        ("always_off", "", False, False, False),
        ("traceidratio", "1", True, True, True),
        ("traceidratio", "0", False, False, False),
        ("ParentBased_Always_Off", "", False, True, False),
        ("parentbased_traceidratio", "", True, True, False),
    ],
)
def test_samplers(name, argument, root, under_sampled, under_unsampled):
    decide = sampler({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument})
    assert [decide(TRACE, parent) for parent in (None, True, False)] == [root, under_sampled, under_unsampled]


@given(st.floats(0, 1), st.integers(1, 2**128 - 1))
def test_a_ratio_is_decided_as_the_sdk_decides_it(ratio, trace_id):
    decide = sampler({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": str(ratio)})
    sdk = TraceIdRatioBased(ratio).should_sample(None, trace_id, "a")
    assert decide(f"{trace_id:032x}", None) == sdk.decision.is_sampled()


@pytest.mark.parametrize(
    ("name", "argument", "named"),
    [
        ("sometimes", "", "OTEL_TRACES_SAMPLER=sometimes"),
        ("traceidratio", "half", "OTEL_TRACES_SAMPLER_ARG=half"),
        ("traceidratio", "1.5", "OTEL_TRACES_SAMPLER_ARG=1.5"),
    ],
)
def test_a_sampler_that_is_not_known_is_one_warning(receiver, monkeypatch, caplog, name, argument, named):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", name)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    assert not tracing.configure("triptych")
    assert [named in record.message for record in caplog.records] == [True]


def test_whoever_collects_gets_all_and_the_exporter_what_is_sampled(receiver, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    collected = Collected()
    assert tracing.configure("triptych-gateway", collected)
    with tracing.start("POST /", kind="server") as unsampled:
        tracing.start("chat", parent=unsampled).end()
        assert (unsampled.sampled, unsampled.traceparent[-2:]) == (False, "00")
    with tracing.start("POST /", kind="server", parent=SAMPLED) as sampled:
        assert (sampled.sampled, sampled.traceparent[-2:]) == (True, "01")
    assert [(span.name, span.trace_id, span.sampled) for span in collected] == [
        ("chat", unsampled.trace_id, False),
        ("POST /", unsampled.trace_id, False),
        ("POST /", TRACE, True),
    ]
    tracing.export("triptych-gateway", encode(collected[1]))  # it ended badly
    assert tracing.flush()
    assert sorted(span.trace_id for span in receiver.spans()) == sorted([unsampled.trace_id, TRACE])


def test_events_and_links_and_nothing_after_the_end(receiver):
    collected = Collected()
    tracing.configure("triptych", collected)
    span = tracing.start("POST /", kind="server")
    span.event("first text", {"n": 1, "none": None}, at_ns=5)
    for number in range(10):
        span.link(f"00-{TRACE}-{number + 1:016x}-01")
    span.link("rubbish")
    span.end()
    span.event("late")
    span.link(SAMPLED)
    assert collected[0].events == [("first text", 5, {"n": 1})]
    assert collected[0].links == [(TRACE, f"{number + 1:016x}") for number in range(8)]
    assert tracing.flush()
    assert tracing.stats() == {"ended": 1, "exported": 1, "failed": 0}


def test_without_an_endpoint_what_is_collected_needs_no_sdk():
    code = (
        "import sys\n"
        "from observability import tracing\n"
        "spans = []\n"
        "assert tracing.configure('triptych-gateway', lambda *span: spans.append(span)) is False\n"
        "with tracing.start('POST /', kind='server') as root: assert not root.sampled\n"
        f"assert tracing.start('POST /', kind='server', parent='{SAMPLED}').traceparent.endswith('-01')\n"
        "assert [service for _, service, *_ in spans] == ['shop']\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    environ = {**clean, "OTEL_RESOURCE_ATTRIBUTES": "a=b,service.name=shop"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ, timeout=30)


def test_an_exception_is_the_spans_error_and_goes_on(receiver):
    tracing.configure("triptych")
    with pytest.raises(ValueError, match="bad"), tracing.start("POST /", kind="server") as span:
        raise ValueError("bad " + "x" * 1000)
    tree = receiver.tree(span.trace_id)
    assert tree.attributes == {"error.type": "ValueError"}
    assert tree.error.startswith("bad x")
    assert len(tree.error) == 500


def test_only_the_first_end_counts(receiver, caplog):
    tracing.configure("triptych")
    span = tracing.start("POST /", kind="server", start_ns=1_000)
    span.end(2_000)
    span.end(3_000)
    span.set({"late": True})
    span.error("late")
    tree = receiver.tree(span.trace_id)
    assert (tree.start_ns, tree.end_ns, tree.attributes, tree.error) == (1_000, 2_000, {}, None)
    assert not caplog.records


def test_a_recorded_span_never_has_a_negative_length(receiver):
    tracing.configure("triptych")
    tracing.record("root", None, 5_000, 4_000, kind="server")
    tracing.flush()
    assert [(span.start_ns, span.end_ns) for span in receiver.spans()] == [(5_000, 5_000)]


def test_a_collector_that_refuses_is_counted(receiver):
    receiver.status = 400
    tracing.configure("triptych")
    tracing.start("POST /", kind="server").end()
    assert tracing.flush()
    assert tracing.stats() == {"ended": 1, "exported": 0, "failed": 1}


def test_a_collector_that_is_busy_is_asked_again_when_it_says(receiver):
    receiver.busy = 1
    tracing.configure("triptych")
    tracing.start("POST /", kind="server").end()
    assert tracing.flush(5000)
    assert tracing.stats() == {"ended": 1, "exported": 1, "failed": 0}
    assert receiver.busy == 0


def test_headers_and_compression_are_the_standard_variables(receiver, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20a%2Cb,x-team=ml")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "gzip")
    tracing.configure("triptych")
    tracing.start("POST /", kind="server").end()
    assert tracing.flush()
    assert [span.name for span in receiver.spans()] == ["POST /"]
    headers = receiver.headers[-1]
    assert (headers["authorization"], headers["x-team"]) == ("Bearer a,b", "ml")
    assert (headers["content-encoding"], headers["content-type"]) == ("gzip", "application/x-protobuf")


def test_a_collector_over_tls_that_wants_to_know_who_asks(monkeypatch, tmp_path):
    cert, key = certificate(tmp_path, "one")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=cert)
    context.load_cert_chain(cert, key)
    context.verify_mode = ssl.CERT_REQUIRED
    with Receiver(tls=context) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", cert)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", cert)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CLIENT_KEY", key)
        tracing.configure("triptych")
        tracing.start("POST /", kind="server").end()
        assert tracing.flush()
        assert [span.name for span in receiver.spans()] == ["POST /"]
        tracing.shutdown()


@pytest.mark.parametrize("compression", ["", "gzip"])
def test_a_collector_by_grpc(monkeypatch, compression):
    taken = []

    class Service(TraceServiceServicer):
        def Export(self, request, context):
            taken.append((request, dict(context.invocation_metadata())))
            if len(taken) == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
            if len(taken) == 3:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "X-Team=ml")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", compression)
    try:
        assert tracing.configure("triptych-generate")
        for _ in range(2):
            tracing.start("generate", kind="server").end()
            assert tracing.flush(10_000)
        assert tracing.stats() == {"ended": 2, "exported": 1, "failed": 1}
        request, metadata = taken[1]
        (resource,) = request.resource_spans
        assert resource.scope_spans[0].spans[0].name == "generate"
        assert metadata["x-team"] == "ml"
    finally:
        tracing.shutdown()
        server.stop(None)


def test_a_collector_that_is_away_holds_nobody(monkeypatch):
    with Receiver() as receiver:
        gone = receiver.endpoint
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", gone)
    tracing.configure("triptych")
    began = time.monotonic()
    tracing.start("POST /", kind="server").end()
    tracing.flush(100)
    tracing.shutdown(200)
    assert time.monotonic() - began < 20  # the exporter alone would retry for longer


def test_a_forked_child_exports_its_own(receiver):
    tracing.configure("triptych")
    root = tracing.start("POST /", kind="server")
    if (child := os.fork()) == 0:
        tracing.start("stage", parent=root.traceparent).end()
        os._exit(0 if tracing.flush(5000) else 1)
    assert os.waitpid(child, 0)[1] == 0
    root.end()
    assert receiver.tree(root.trace_id, expect={"POST /", "stage"}).names() == ["POST /", "stage"]


def test_an_exit_exports_what_is_waiting(receiver):
    code = (
        "from observability import tracing\n"
        "tracing.configure('triptych')\n"
        f"tracing.start('last', kind='server', parent='{SAMPLED}').end()\n"
    )
    environ = {**os.environ, "OTEL_BSP_SCHEDULE_DELAY": "60000"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ, timeout=30)
    assert [span.name for span in receiver.spans_of(TRACE)] == ["last"]


# The receiver itself: it must refuse what a user would see as a broken trace.


def _span(span_id: str, parent_id: str = "", start: int = 0, end: int = 10, name: str = "") -> ReceivedSpan:
    return ReceivedSpan(TRACE, span_id, parent_id, name or span_id, "internal", start, end, "triptych")


@pytest.mark.parametrize(
    ("spans", "complaint"),
    [
        ([], "0 roots"),
        ([_span("a"), _span("b", "gone")], "b is an orphan"),
        ([_span("a"), _span("b")], "2 roots"),
        ([_span("a"), _span("a")], "two spans have the id a"),
        ([_span("a", start=5, end=4)], "a ends before it starts"),
        ([_span("a"), _span("b", "c"), _span("c", "b")], "ancestors"),
        ([_span("a"), _span("b", "a", end=9_000_000)], "b is outside a by 9.00 ms"),
        (
            [_span("a", start=9_000_000, end=9_000_001), _span("b", "a", end=9_000_000)],
            "b is outside a by 9.00 ms",
        ),
    ],
)
def test_the_receiver_refuses_a_broken_trace(spans, complaint):
    with pytest.raises(BrokenTrace, match=complaint):
        build_tree(spans)


def test_the_receiver_accepts_a_whole_trace():
    spans = [_span("c", "a", 6, 9), _span("b", "a", 1, 5), _span("a", CALLER)]
    tree = build_tree(spans, remote_parent=CALLER)
    assert tree.names() == ["a", "b", "c"]
    assert str(tree).splitlines()[1].startswith("  b [triptych, internal]")
    with pytest.raises(BrokenTrace, match="0 spans named"):
        tree.find("d")


def test_the_receiver_reads_json_and_gzip_and_reports_rubbish():
    span = {
        "traceId": TRACE.upper(),
        "spanId": CALLER,
        "name": "generate",
        "kind": 2,
        "startTimeUnixNano": "5",
        "endTimeUnixNano": "7",
        "attributes": [
            {"key": "n", "value": {"intValue": "3"}},
            {"key": "list", "value": {"arrayValue": {"values": [{"stringValue": "x"}]}}},
        ],
        "status": {"code": 2, "message": "no"},
    }
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "triton"}}]}
    body = json.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": [span]}]}]}).encode()

    def post(endpoint: str, path: str, body: bytes, **headers: str) -> int:
        request = urllib.request.Request(endpoint + path, body, headers)
        with urllib.request.urlopen(request, timeout=5) as response:
            return int(response.status)

    with Receiver() as receiver:
        head = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        assert post(receiver.endpoint, "/v1/traces", gzip.compress(body), **head) == 200
        (got,) = receiver.spans_of(TRACE)
        assert (got.name, got.kind, got.service, got.error, got.end_ns) == (
            "generate",
            "server",
            "triton",
            "no",
            7,
        )
        assert got.attributes == {"n": 3, "list": ["x"]}
        for path, rubbish in [("/v1/traces", b"\xff\xff"), ("/v1/metrics", b"")]:
            with pytest.raises(urllib.error.HTTPError, match="400"):
                post(receiver.endpoint, path, rubbish, **{"Content-Type": "application/x-protobuf"})
        assert len(receiver.unreadable) == 2
        with pytest.raises(BrokenTrace, match="1 of 2 spans"):
            receiver.spans_of(TRACE, timeout=0.1, count=2)
        with pytest.raises(BrokenTrace, match="lacks"):
            receiver.tree(TRACE, expect={"decode"}, timeout=0.1)
