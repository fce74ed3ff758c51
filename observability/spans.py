"""One span, ended, and traces of them in OTLP JSON: how they are shown, and how Triton tells its own.

Knows no OpenTelemetry package, no transport and no meaning of any attribute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
SCOPE = "triptych"
INT64 = 2**63
STATUS_ERROR = 2  # STATUS_CODE_ERROR


class Event(NamedTuple):
    """Something that happened at a moment of a span."""

    name: str
    at_ns: int
    attributes: Mapping[str, Any] = {}


class Link(NamedTuple):
    """A span of another trace that has to do with this one."""

    trace_id: str
    span_id: str


@dataclass(slots=True)
class SpanData:
    """Ids are lower-case hex, times unix nanoseconds, attributes what OTLP has: str, bool, int, float, lists."""

    trace_id: str
    span_id: str
    parent_id: str  # "" for a root
    name: str
    kind: str
    start_ns: int
    end_ns: int
    service: str
    sampled: bool = True
    attributes: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    error: str | None = None  # the status message when the status is an error

    @property
    def duration_ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


def document(spans: Iterable[SpanData]) -> bytes:
    """The OTLP JSON of whole traces."""
    services: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        services.setdefault(span.service, []).append(_told(span))
    resources = [
        {
            "resource": {"attributes": _attributes({"service.name": service})},
            "scopeSpans": [{"scope": {"name": SCOPE}, "spans": told}],
        }
        for service, told in services.items()
    ]
    try:
        return orjson.dumps({"resourceSpans": resources})
    except TypeError:  # half of a surrogate pair is in a string: no UTF-8 can hold it
        return orjson.dumps(_storable({"resourceSpans": resources}))


def read_document(otlp: bytes | str | Mapping[str, Any]) -> list[SpanData]:
    """The spans of an OTLP JSON document, in order of time. Raises ValueError if it is none."""
    held = otlp if isinstance(otlp, Mapping) else orjson.loads(otlp)
    try:
        spans = [
            _span(span, str(_read(resource.get("resource", {}).get("attributes", ())).get("service.name", "")))
            for resource in held["resourceSpans"]
            for scope in resource.get("scopeSpans", ())
            for span in scope.get("spans", ())
        ]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not an OTLP JSON document: {type(error).__name__} {error}") from None
    return sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))


def _told(span: SpanData) -> dict[str, Any]:
    told: dict[str, Any] = {
        "traceId": span.trace_id,
        "spanId": span.span_id,
        "flags": 1 if span.sampled else 0,
        "name": span.name,
        "kind": KINDS.index(span.kind),
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _attributes(span.attributes),
    }
    if span.parent_id:
        told["parentSpanId"] = span.parent_id
    if span.events:
        told["events"] = [
            {"name": event.name, "timeUnixNano": str(event.at_ns), "attributes": _attributes(event.attributes)}
            for event in span.events
        ]
    if span.links:
        told["links"] = [{"traceId": link.trace_id, "spanId": link.span_id} for link in span.links]
    if span.error is not None:
        told["status"] = {"code": STATUS_ERROR, "message": span.error} if span.error else {"code": STATUS_ERROR}
    return told


def _span(told: Mapping[str, Any], service: str) -> SpanData:
    status = told.get("status", {})
    return SpanData(
        trace_id=told["traceId"].lower(),
        span_id=told["spanId"].lower(),
        parent_id=told.get("parentSpanId", "").lower(),
        name=told["name"],
        kind=KINDS[told.get("kind", 0)],
        start_ns=int(told["startTimeUnixNano"]),
        end_ns=int(told["endTimeUnixNano"]),
        service=service,
        sampled=bool(told.get("flags", 1) & 1),
        attributes=_read(told.get("attributes", ())),
        events=[
            Event(event["name"], int(event["timeUnixNano"]), _read(event.get("attributes", ())))
            for event in told.get("events", ())
        ],
        links=[Link(link["traceId"].lower(), link["spanId"].lower()) for link in told.get("links", ())],
        error=status.get("message", "") if status.get("code") == STATUS_ERROR else None,
    )


def _attributes(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)} if -INT64 <= value < INT64 else {"stringValue": str(value)}
    if isinstance(value, float):  # proto3 JSON: what JSON has no number for is a string
        spelled = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return {"doubleValue": value if math.isfinite(value) else spelled}
    if isinstance(value, Sequence):
        return {"arrayValue": {"values": [_value(item) for item in value]}}
    return {"stringValue": str(value)}


def _read(attributes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {attribute["key"]: _read_value(attribute["value"]) for attribute in attributes}


def _read_value(value: Mapping[str, Any]) -> Any:
    for kind, held in value.items():
        if kind == "intValue":
            return int(held)
        if kind == "doubleValue":
            return float(held)
        if kind == "arrayValue":
            return [_read_value(item) for item in held.get("values", ())]
        return held
    return None


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return [_storable(item) for item in value] if isinstance(value, list) else value
