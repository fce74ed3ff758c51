"""A trace in Jaeger's own JSON, as its UI's upload and its query API have it. Pure.

Times are microseconds; a span's parent is a CHILD_OF reference, what it links to FOLLOWS_FROM; events are logs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from observability.spans import SCOPE, Event, SpanData


def document(spans: Sequence[SpanData]) -> dict[str, Any]:
    """One entry of `data` a trace id."""
    traces: dict[str, list[SpanData]] = {}
    for span in spans:
        traces.setdefault(span.trace_id, []).append(span)
    data = [_trace(trace_id, found) for trace_id, found in traces.items()]
    return {"data": data, "total": 0, "limit": 0, "offset": 0, "errors": None}


def _trace(trace_id: str, spans: Sequence[SpanData]) -> dict[str, Any]:
    processes: dict[str, str] = {}  # by service
    for span in spans:
        processes.setdefault(span.service, f"p{len(processes) + 1}")
    return {
        "traceID": trace_id,
        "spans": [_span(span, processes[span.service]) for span in spans],
        "processes": {key: {"serviceName": service or "unknown", "tags": []} for service, key in processes.items()},
        "warnings": None,
    }


def _span(span: SpanData, process: str) -> dict[str, Any]:
    references = [_reference("CHILD_OF", span.trace_id, span.parent_id)] if span.parent_id else []
    references += [_reference("FOLLOWS_FROM", link.trace_id, link.span_id) for link in span.links]
    tags = [_tag(key, value) for key, value in span.attributes.items()]
    tags += [_tag("span.kind", span.kind), _tag("otel.scope.name", SCOPE)]
    if span.error is not None:
        tags += [_tag("otel.status_code", "ERROR"), _tag("error", True)]
        tags += [_tag("otel.status_description", span.error)] if span.error else []
    start, end = span.start_ns // 1000, span.end_ns // 1000
    return {
        "traceID": span.trace_id,
        "spanID": span.span_id,
        "operationName": span.name,
        "references": references,
        "startTime": start,
        "duration": end - start,
        "tags": tags,
        "logs": [_log(event) for event in span.events],
        "processID": process,
        "warnings": None,
    }


def _reference(kind: str, trace_id: str, span_id: str) -> dict[str, str]:
    return {"refType": kind, "traceID": trace_id, "spanID": span_id}


def _log(event: Event) -> Mapping[str, Any]:
    fields = [_tag("event", event.name), *(_tag(key, value) for key, value in event.attributes.items())]
    return {"timestamp": event.at_ns // 1000, "fields": fields}


def _tag(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"key": key, "type": "bool", "value": value}
    if isinstance(value, int):
        return {"key": key, "type": "int64", "value": value}
    if isinstance(value, float):
        return {"key": key, "type": "float64", "value": value}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)  # Jaeger has no lists
    return {"key": key, "type": "string", "value": text}
