"""`triptych trace` after a request, at the real product with no collector: drawn, and as files that others read.

And the traces themselves: each kind of request leaves one that is whole, though nothing is sampled.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from observability.completeness import GATEWAY, STAGES, check
from observability.spans import SpanData, read_document
from observability.waterfall import display_width
from tests.product import Product, free_port, wait_for
from tests.test_cli import triptych
from tests.test_jaeger import SCHEMA
from tests.test_stack import ask


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, catalog: Path) -> Iterator[Product]:
    """Echoes without a collector: the ring is all there is."""
    env = {"TRIPTYCH_CATALOG": str(catalog)}
    product = Product(tmp_path_factory.mktemp("kept"), "echo", "echo-slow", "echo-small", env=env)
    try:
        yield product.wait_ready()
    finally:
        product.stop()
        print(product.log_text()[-2000:])


def chat(product: Product, id: str, model: str = "echo", **body: Any) -> httpx.Response:
    request = {"model": model, "messages": ask("Hi there"), "max_tokens": 20, **body}
    return httpx.post(
        f"{product.url}/v1/chat/completions",
        json=request,
        headers={"x-request-id": id, **TRACED.get(id, {})},
        timeout=60,
    )


TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACED = {id: {"traceparent": f"00-{TRACE}-{CALLER}-00"} for id in ("asks", "answers")}


def spans_of(product: Product, id: str, count: int = 1) -> list[SpanData]:
    """The trace of a request, once it has so many spans."""
    found: list[SpanData] = []

    def there() -> bool:
        answer = httpx.get(f"{product.url}/admin/traces/{id}", timeout=30)
        found[:] = read_document(answer.content) if answer.status_code == 200 else []
        return len(found) >= count

    wait_for(there, 20, f"{count} spans of {id}")
    return found


def test_the_last_request_is_explained(kept: Product, tmp_path: Path) -> None:
    for number in range(6):
        assert chat(kept, f"earlier-{number}", stream=bool(number % 2)).status_code == 200
    chat(kept, "wanted-模型".encode().hex(), stream=True)
    shown = triptych("trace", "--last", "--url", kept.url, COLUMNS="80", PYTHONIOENCODING="utf-8")
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert all(display_width(line) <= 80 for line in lines)
    assert "\x1b" not in shown.stdout  # no terminal, no colours
    assert lines[0].split()[0] in {"admission", "preprocess", "queue", "prefill", "decode", "postprocess"}
    assert "wanted-模型".encode().hex() in shown.stdout
    drawn = [line.replace("│", " ").replace("├", " ").replace("└", " ").split() for line in lines[4:]]
    for name in STAGES | GATEWAY | {"sse.write"}:
        assert sum(words[:1] == [name] for words in drawn) == 1, shown.stdout

    again = triptych("trace", "earlier-3", "--url", kept.url, COLUMNS="60", PYTHONIOENCODING="ascii")
    assert again.returncode == 0
    assert again.stdout.isascii()
    assert "request earlier-3" in again.stdout

    files = tmp_path / "jaeger.json", tmp_path / "otlp.json"
    written = triptych("trace", "--json", str(files[0]), "--otlp", str(files[1]), "--url", kept.url)
    assert (written.returncode, written.stdout) == (0, "")
    jaeger, otlp = (json.loads(file.read_text()) for file in files)
    SCHEMA.validate(jaeger)
    spans = read_document(otlp)
    assert check(spans, expect=STAGES | GATEWAY | {"sse.write", "chat echo"}) == []
    (trace,) = jaeger["data"]
    assert {span["spanID"] for span in trace["spans"]} == {span.span_id for span in spans}
    assert {process["serviceName"] for process in trace["processes"].values()} == {
        "triptych-gateway",
        "triptych-preprocess",
        "triptych-generate",
        "triptych-orchestrator",
    }


def test_the_slowest_is_found_and_compared(kept: Product) -> None:
    for number in range(6):
        chat(kept, f"brief-{number}", "echo-slow", max_tokens=2)
    chat(kept, "long", "echo-slow", max_tokens=40)
    shown = triptych("trace", "--slow", "--url", kept.url, PYTHONIOENCODING="utf-8")
    assert "request long" in shown.stdout
    assert "6)" in shown.stdout or "no stage was slower" in shown.stdout  # by the token it is as ever


def test_what_cannot_be_shown_is_one_sentence(kept: Product, tmp_path: Path) -> None:
    port = free_port()
    for words, sentence in [
        (["req_gone", "--url", kept.url], "No request 'req_gone' is kept"),
        (["--url", f"http://127.0.0.1:{port}"], f"no gateway answers at http://127.0.0.1:{port}"),
        (["--url", kept.url.removeprefix("http://")], "must begin with http://"),
        (["--json", str(tmp_path / "no" / "file"), "--url", kept.url], "cannot be written: No such file"),
    ]:
        refused = triptych("trace", *words)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith("triptych: ")
        assert sentence in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_an_empty_ring_says_what_to_do(own_product: Product) -> None:
    empty = triptych("trace", "--url", own_product.url)
    assert (empty.returncode, "send one" in empty.stderr) == (1, True)


@pytest.mark.parametrize(
    ("id", "body", "expect", "most"),
    [
        ("whole", {}, STAGES, 11),
        ("streamed", {"stream": True}, STAGES | {"sse.write"}, 12),
        ("choices", {"n": 4}, STAGES, 20),
        ("long-answer", {"max_tokens": 2000, "stream": True}, STAGES | {"sse.write"}, 12),
    ],
)
def test_a_request_leaves_a_whole_trace(kept: Product, id: str, body: Any, expect: set[str], most: int) -> None:
    assert chat(kept, id, **body).status_code == 200
    spans = spans_of(kept, id, 3 + len(expect))
    assert check(spans, expect=expect | GATEWAY | {"chat echo"}) == []
    assert len(spans) <= most
    root = spans[0]
    assert (root.kind, root.attributes["http.response.status_code"], root.error) == ("server", 200, None)
    (call,) = [span for span in spans if span.name == "chat echo"]
    assert call.attributes["gen_ai.operation.name"] == "chat"
    assert call.attributes["gen_ai.provider.name"] == "triptych"
    assert call.attributes["gen_ai.response.time_to_first_chunk"] > 0
    assert not [key for span in spans for key in span.attributes if key.endswith(".messages")]
    for span in spans:
        if span.name == "decode":
            assert 1 <= sum(span.attributes["triptych.gap_ms.counts"]) <= body.get("max_tokens", 20) - 1
            assert len(span.attributes["triptych.gap_ms.counts"]) <= 64


def test_a_tool_loop_is_one_trace_of_whole_requests(kept: Product) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    called = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    follow_up = [
        *ask("Hi there"),
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert chat(kept, "asks", tools=tools, tool_choice="none").status_code == 200
    assert chat(kept, "answers", tools=tools, tool_choice="none", messages=follow_up).status_code == 200
    for id in ("asks", "answers"):
        spans = spans_of(kept, id, 11)
        assert check(spans, expect=STAGES | GATEWAY, remote_parent=CALLER) == []
        assert {span.trace_id for span in spans} == {TRACE}
    assert len(spans_of(kept, TRACE, 22)) == 22


def test_a_failed_request_leaves_a_whole_trace(kept: Product) -> None:
    assert chat(kept, "failed", "echo-small", messages=ask("word " * 100)).status_code == 400
    spans = spans_of(kept, "failed", 4)
    assert check(spans, expect={"preprocess", "admission"}) == []
    (stage,) = [span for span in spans if span.name == "preprocess"]
    assert (stage.attributes["error.type"], stage.error is not None) == ("context_length_exceeded", True)
    shown = triptych("trace", "failed", "--url", kept.url, PYTHONIOENCODING="utf-8")
    assert shown.stdout.startswith("preprocess failed after ")
    assert "✗ context_length_exceeded" in shown.stdout


def test_a_cancelled_request_leaves_a_whole_trace_and_says_when(kept: Product) -> None:
    body = {"model": "echo-slow", "messages": ask("Hi there"), "max_tokens": 5000, "stream": True}
    headers = {"x-request-id": "left"}
    with httpx.stream("POST", f"{kept.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as stream:
        for line in stream.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                break
    spans = spans_of(kept, "left", 11)
    assert check(spans, expect=STAGES - {"postprocess"} | {"sse.write"}) == []
    shown = triptych("trace", "left", "--url", kept.url)
    assert shown.stdout.startswith("The client left after ")
    (listed,) = [entry for entry in kept.get("/admin/traces")[1]["data"] if entry["request_id"] == "left"]
    assert (listed["status"], listed["kept"]) == (499, "cancelled")


def test_who_shared_the_batch_is_linked(kept: Product) -> None:
    """At most eight of them, each a trace that is kept."""
    ids = [f"mate-{number}" for number in range(12)]
    threads = [threading.Thread(target=chat, args=(kept, id, "echo-slow"), kwargs={"max_tokens": 60}) for id in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    traces = {id: spans_of(kept, id, 11) for id in ids}
    known = {(span.trace_id, span.span_id) for spans in traces.values() for span in spans}
    linked = 0
    for spans in traces.values():
        (generate,) = [span for span in spans if span.name == "generate"]
        assert generate.attributes["triptych.batch.size"] >= 1
        assert len(generate.links) <= 8
        assert {tuple(link) for link in generate.links} <= known
        assert not [link for link in generate.links if link.trace_id == generate.trace_id]
        linked += bool(generate.links)
    assert linked >= 6
