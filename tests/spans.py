"""Spans made up for tests: the tree of a request, with times that can be chosen."""

from __future__ import annotations

from typing import Any

from observability.spans import SpanData

TRACE = "0af7651916cd43dd8448eb211c80319c"
MS = 1_000_000
BEGAN = 1_763_700_000_000_000_000


def span(name: str, start_ms: float, end_ms: float, parent: str = "", **options: Any) -> SpanData:
    """Its id is made of its name, or given as `id`; `parent` is a name or an id."""
    id = options.pop("id", "") or name
    return SpanData(
        trace_id=options.pop("trace_id", TRACE),
        span_id=span_id(id),
        parent_id=span_id(parent) if parent else "",
        name=name,
        kind=options.pop("kind", "internal"),
        start_ns=BEGAN + int(start_ms * MS),
        end_ns=BEGAN + int(end_ms * MS),
        service=options.pop("service", "triptych-gateway"),
        **options,
    )


def span_id(name: str) -> str:
    return name.encode().hex()[:16].rjust(16, "f")


def request(prefill_ms: float = 80, decode_ms: float = 100, tokens: int = 11) -> list[SpanData]:
    """A streamed chat, as a trace has it: admission, preprocess, queue, prefill and decode in turn."""
    decoding = 6 + prefill_ms
    ended = decoding + decode_ms
    generated = {"gen_ai.usage.output_tokens": tokens}
    stage = {"service": "triptych-generate"}
    return [
        span("POST /v1", 0, ended + 2, kind="server", attributes={"triptych.request_id": "req_1"}),
        span("admission", 0.1, 1, "POST /v1"),
        span("chat m", 1, ended + 1, "POST /v1", kind="client"),
        span("preprocess", 2, 5, "chat m", service="triptych-preprocess"),
        span("render", 2, 3, "preprocess", service="triptych-preprocess"),
        span("tokenize", 3, 5, "preprocess", service="triptych-preprocess"),
        span("generate", 5, ended, "chat m", attributes=generated, **stage),
        span("queue", 5, 6, "generate", **stage),
        span("prefill", 6, decoding, "generate", **stage),
        span("decode", decoding, ended, "generate", **stage),
        span("postprocess", decoding, ended, "chat m", attributes={"triptych.busy_ms": 2.0}),
        span("sse.write", 6, ended + 1.5, "POST /v1"),
    ]
