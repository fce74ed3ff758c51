"""One request is one trace: complete, parented right and small, whatever the way in. At a real OTLP receiver."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from observability.completeness import check
from observability.spans import read_document
from tests.orchestrator_call import OrchestratorCall
from tests.otlp_receiver import ReceivedSpan, Receiver
from tests.product import Product, wait_for
from tests.test_stack import ask

STAGES = {"preprocess", "render", "tokenize", "generate", "queue", "prefill", "decode", "postprocess"}


TRITONS = {"triton InferRequest", "triton echo-orchestrator", "triton compute"}


@pytest.fixture
def own_traced(tmp_path: Path, catalog: Path, otlp: Receiver) -> Iterator[Product]:
    """Whose requests are all this test's: the shared product's have a 95th percentile, which one in twenty is over."""
    env = {"TRIPTYCH_CATALOG": str(catalog), "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint}
    product = Product(tmp_path, "echo-small", env={**env, "OTEL_BSP_SCHEDULE_DELAY": "100"})
    try:
        yield product.wait_ready()
    finally:
        product.stop()


def new_trace() -> tuple[str, str, str]:
    """A trace id, the id of the caller's span, and both as a traceparent."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return trace_id, span_id, f"00-{trace_id}-{span_id}-01"


def names(span: ReceivedSpan) -> Any:
    """The tree's names, children in the order of their start."""
    return (span.name, [names(child) for child in sorted(span.children, key=lambda child: child.start_ns)])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("max_tokens", [3, 300])
def test_a_chat_is_one_small_tree(product: Product, otlp: Receiver, stream: bool, max_tokens: int) -> None:
    trace_id, span_id, traceparent = new_trace()
    body = {"model": "echo", "messages": ask("Hi there"), "max_tokens": max_tokens, "stream": stream, "seed": 5}
    headers = {"traceparent": traceparent, "x-request-id": "trace-test"}
    answer = httpx.post(f"{product.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.headers["x-request-id"] == "trace-test"
    expect = STAGES | {"admission", "chat echo"} | ({"sse.write"} if stream else set())
    root = otlp.tree(trace_id, expect=expect, remote_parent=span_id, timeout=10)
    assert root.name == "POST /v1/chat/completions"
    assert root.kind == "server"
    spans = list(root.walk())
    assert len(spans) <= 20
    assert sorted(span.name for span in spans) == sorted({root.name, *expect})

    chat = root.find("chat echo")
    assert {child.name for child in chat.children} == {"preprocess", "generate", "postprocess"}
    assert {child.name for child in root.children} == {"admission", chat.name} | ({"sse.write"} if stream else set())
    assert [child.name for child in root.find("preprocess").children] == ["render", "tokenize"]
    assert [child.name for child in root.find("generate").children] == ["queue", "prefill", "decode"]
    assert {span.name: span.service for span in spans if span.name in ("preprocess", "generate", "postprocess")} == {
        "preprocess": "triptych-preprocess",
        "generate": "triptych-generate",
        "postprocess": "triptych-orchestrator",  # it adds up the calls of the stateless stage
    }
    assert chat.kind == "client"
    assert chat.attributes["gen_ai.operation.name"] == "chat"
    assert chat.attributes["gen_ai.request.model"] == "echo"
    assert chat.attributes["gen_ai.usage.output_tokens"] == max_tokens
    assert root.find("generate").attributes["gen_ai.usage.output_tokens"] == max_tokens
    assert root.attributes["http.response.status_code"] == 200
    assert len(root.find("decode").attributes["triptych.gap_ms.counts"]) <= 64


def test_several_choices_are_one_small_tree(product: Product, otlp: Receiver) -> None:
    """The stages of the first two are in it: with those of all it would not fit on a screen."""
    trace_id, span_id, traceparent = new_trace()
    body = {"model": "echo", "messages": ask("Hi there"), "max_tokens": 5, "stream": True, "n": 4}
    answer = httpx.post(
        f"{product.url}/v1/chat/completions", json=body, headers={"traceparent": traceparent}, timeout=60
    )
    assert answer.text.endswith("data: [DONE]\n\n")
    own = ["POST /v1/chat/completions", "admission", "chat echo", "sse.write"]
    spans = otlp.spans_of(trace_id, timeout=10, count=len(own) + 2 * len(STAGES))
    root = otlp.tree(trace_id, expect={"chat echo"}, remote_parent=span_id, timeout=10)
    assert sorted(span.name for span in root.walk()) == sorted([*own, *STAGES, *STAGES])
    assert len(spans) <= 25
    chat = root.find("chat echo")
    assert chat.attributes["gen_ai.request.choice.count"] == 4
    assert chat.attributes["gen_ai.usage.output_tokens"] == 20


def test_the_failing_stage_carries_the_error(product: Product, otlp: Receiver) -> None:
    trace_id, span_id, traceparent = new_trace()
    body = {"model": "echo-small", "messages": ask("word " * 100)}
    answer = httpx.post(f"{product.url}/v1/chat/completions", json=body, headers={"traceparent": traceparent})
    assert answer.status_code == 400
    root = otlp.tree(trace_id, expect={"preprocess"}, remote_parent=span_id, timeout=10)
    assert root.find("preprocess").attributes["error.type"] == "context_length_exceeded"
    assert root.attributes["http.response.status_code"] == 400


def test_a_direct_ensemble_call_is_traced(product: Product, otlp: Receiver) -> None:
    trace_id, span_id, traceparent = new_trace()
    inputs = {"prompt": "Hi there", "sampling": '{"max_tokens": 5}'}
    product.infer("echo-ensemble", inputs, parameters={"traceparent": traceparent})
    spans = otlp.spans_of(trace_id, timeout=10, count=len(STAGES))
    assert sorted(span.name for span in spans) == sorted(STAGES)
    ids = {span.span_id for span in spans} | {span_id}
    assert all(span.parent_id in ids for span in spans)
    top = {span.name for span in spans if span.parent_id == span_id}
    assert top == {"preprocess", "generate", "postprocess"}


def test_a_direct_orchestrator_call_is_traced(product: Product, otlp: Receiver) -> None:
    trace_id, span_id, traceparent = new_trace()
    inputs = {"prompt": "Hi there", "sampling": '{"max_tokens": 5}'}
    call = OrchestratorCall(product, "echo-orchestrator", inputs, traceparent=traceparent)
    call.deltas()
    call.close()
    spans = otlp.spans_of(trace_id, timeout=10, count=len(STAGES))
    assert {span.name for span in spans if span.parent_id == span_id} == {"preprocess", "generate", "postprocess"}


@pytest.mark.parametrize("stream", [True, False])
def test_a_deep_trace_has_tritons_own_spans(product: Product, otlp: Receiver, stream: bool) -> None:
    trace_id, span_id, traceparent = new_trace()
    body = {"model": "echo", "messages": ask("Hi there"), "max_tokens": 20, "stream": stream}
    headers = {"traceparent": traceparent, "x-triptych-trace": "deep", "x-request-id": f"deep-{stream}"}
    answer = httpx.post(f"{product.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200
    expect = STAGES | TRITONS | {"admission", "chat echo"}
    root = otlp.tree(trace_id, expect=expect, remote_parent=span_id, timeout=10)
    request = root.find("chat echo").find("triton InferRequest")
    assert request in root.find("chat echo").children
    assert [child.name for child in request.children] == ["triton echo-orchestrator"]
    assert {span.service for span in request.walk()} == {"triptych-triton"}
    kept = read_document(httpx.get(f"{product.url}/admin/traces/deep-{stream}").content)
    assert check(kept, expect=expect, remote_parent=span_id) == []


def test_a_deep_request_that_is_cancelled_stops_the_engine(product: Product, otlp: Receiver) -> None:
    """The cancel goes by another stream than the submission went."""
    trace_id, _, traceparent = new_trace()
    before = product.counters("echo-slow-generate")
    body = {"model": "echo-slow", "messages": ask("Hi there"), "max_tokens": 5000, "stream": True}
    headers = {"traceparent": traceparent, "x-triptych-trace": "deep"}
    with httpx.stream("POST", f"{product.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as stream:
        next(stream.iter_lines())
    wait_for(lambda: product.counters("echo-slow-generate")["cancelled"] == before["cancelled"] + 1, 10)
    expect = (STAGES | {"triton InferRequest"}) - {"postprocess"}
    otlp.spans_of(trace_id, timeout=10, count=len(expect))


def test_a_refused_deep_request_is_refused_as_any_other(product: Product) -> None:
    url, deep = f"{product.url}/v1/chat/completions", {"x-triptych-trace": "deep"}
    body = {"model": "echo-small", "messages": ask("word " * 100)}
    answers = [httpx.post(url, json=body, headers=headers).json()["error"] for headers in ({}, deep)]
    assert answers[0] == answers[1]
    unknown = httpx.post(url, json=body, headers={"x-triptych-trace": "deeper"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "x-triptych-trace")


@pytest.mark.parametrize("deep", [True, False])
def test_tritons_spans_join_a_direct_call_that_has_the_header(product: Product, otlp: Receiver, deep: bool) -> None:
    """By the request parameter alone the trace is the stages'."""
    trace_id, span_id, traceparent = new_trace()
    inputs = {"prompt": "Hi there", "sampling": '{"max_tokens": 5}'}
    told = {"traceparent": traceparent}
    product.infer("echo-ensemble", inputs, **({"headers": told} if deep else {"parameters": told}))
    steps = [f"triton echo-{stage}" for stage in ("ensemble", "preprocess", "generate", "postprocess")]
    tritons = ["triton InferRequest", *steps, *["triton compute"] * 3] if deep else []
    spans = otlp.spans_of(trace_id, timeout=10, count=len(STAGES) + len(tritons))
    assert sorted(span.name for span in spans) == sorted([*STAGES, *tritons])
    top = {span.name for span in spans if span.parent_id == span_id}
    assert top == {"preprocess", "generate", "postprocess"} | set(tritons[:1])


def test_an_unsampled_request_leaves_no_span(own_traced: Product, otlp: Receiver) -> None:
    """Its pipeline has too few requests behind it to call this one slow, for which it would be exported."""
    trace_id, _, traceparent = new_trace()
    body = {"model": "echo-small", "messages": ask("Hi"), "max_tokens": 3}
    url, unsampled = f"{own_traced.url}/v1/chat/completions", traceparent[:-2] + "00"
    assert httpx.post(url, json=body, headers={"traceparent": unsampled}).status_code == 200
    sampled_id, sampled_span, sampled = new_trace()
    httpx.post(url, json=body, headers={"traceparent": sampled})
    otlp.tree(sampled_id, expect=STAGES, remote_parent=sampled_span, timeout=10)  # by now the first one's would be here
    assert [span for span in otlp.spans() if span.trace_id == trace_id] == []
    kept = {trace["id"]: trace["kept"] for trace in httpx.get(f"{own_traced.url}/admin/traces").json()["data"]}
    assert kept == {trace_id: "recent", sampled_id: "sampled"}


def test_tracing_off_costs_no_import(own_product: Product) -> None:
    """Unset, nothing of the SDK is loaded: no exporter thread, no protobuf of OTLP."""
    body = json.dumps({"model": "echo-slow", "prompt": "a", "max_tokens": 1})
    assert httpx.post(f"{own_product.url}/v1/completions", content=body, timeout=30).status_code == 200
    for pid in (own_product.pid, own_product.stub("echo-slow-generate")):
        threads = {
            Path(f"/proc/{pid}/task/{task}/comm").read_text().strip() for task in os.listdir(f"/proc/{pid}/task")
        }
        assert not any("Otel" in thread for thread in threads)


def test_an_unsampled_request_that_ends_badly_is_exported_whole(product: Product, otlp: Receiver) -> None:
    """Every process kept its spans for that."""
    trace_id, span_id, traceparent = new_trace()
    body = {"model": "echo-slow", "messages": ask("Hi there"), "max_tokens": 5000, "stream": True}
    headers = {"traceparent": traceparent[:-2] + "00"}
    with httpx.stream("POST", f"{product.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as stream:
        for line in stream.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                break
    own = {"admission", "chat echo-slow", "sse.write"}
    expect = (STAGES - {"postprocess"}) | own
    root = otlp.tree(trace_id, expect=expect, remote_parent=span_id, timeout=20, tolerance_ns=2_000_000_000)
    assert sorted(span.name for span in root.walk()) == sorted({root.name, *expect})
    assert {span.service for span in root.walk()} == {"triptych-gateway", "triptych-preprocess", "triptych-generate"}
