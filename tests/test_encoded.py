"""A span survives its protobuf, whatever is in it, and is what OpenTelemetry's own classes would have written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from observability.encoded import decode, encode, export_request, trace_id_of
from observability.spans import SpanData
from tests.spans import TRACE, request, span
from tests.test_spans import _SPANS


@given(_SPANS)
def test_a_span_is_read_back_as_it_was(original):
    encoded = encode(original)
    assert trace_id_of(encoded) == original.trace_id
    assert decode(encoded, original.service) == original


@given(_SPANS)
def test_it_says_what_the_generated_classes_would(original):
    assert Span.FromString(encode(original)) == _generated(original)


def _generated(span: SpanData) -> Span:
    status = None
    if span.error is not None:
        status = Status(code=Status.STATUS_CODE_ERROR, message=span.error)
    return Span(
        trace_id=bytes.fromhex(span.trace_id),
        span_id=bytes.fromhex(span.span_id),
        parent_span_id=bytes.fromhex(span.parent_id),
        name=span.name,
        kind=f"SPAN_KIND_{span.kind.upper()}",
        start_time_unix_nano=span.start_ns,
        end_time_unix_nano=span.end_ns,
        attributes=_attributes(span.attributes),
        events=[
            Span.Event(time_unix_nano=event.at_ns, name=event.name, attributes=_attributes(event.attributes))
            for event in span.events
        ],
        links=[
            Span.Link(trace_id=bytes.fromhex(link.trace_id), span_id=bytes.fromhex(link.span_id)) for link in span.links
        ],
        status=status,
        flags=1 if span.sampled else 0,
    )


def _attributes(attributes: Mapping[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=key, value=_value(value)) for key, value in attributes.items()]


def _value(value: Any) -> AnyValue:
    if isinstance(value, list):
        return AnyValue(array_value=ArrayValue(values=[_value(item) for item in value]))
    kinds = {str: "string_value", bool: "bool_value", int: "int_value", float: "double_value"}
    return AnyValue(**{kinds[type(value)]: value})


@given(st.lists(_SPANS, max_size=4))
def test_a_request_holds_every_span_below_its_service(originals):
    resources = {one.service: {"service.name": one.service, "n": 1} for one in originals}
    encoded = export_request([(one.service, encode(one)) for one in originals], resources, "1.2")
    told = ExportTraceServiceRequest.FromString(encoded)
    found = []
    for resource in told.resource_spans:
        attributes = {item.key: item.value for item in resource.resource.attributes}
        (scope,) = resource.scope_spans
        assert (scope.scope.name, scope.scope.version, attributes["n"].int_value) == ("triptych", "1.2", 1)
        service = attributes["service.name"].string_value
        found += [decode(one.SerializeToString(), service) for one in scope.spans]
    assert len(told.resource_spans) == len(resources)
    assert sorted(map(repr, found)) == sorted(map(repr, originals))


def test_what_protobuf_cannot_say_is_said_as_text():
    odd = span("a", 0, 1, attributes={"n": math.nan, "big": 2**70, "half\ud83d": "\ud83d", "o": object, "b": b"ab"})
    told = decode(encode(odd), "").attributes
    assert math.isnan(told.pop("n"))
    assert told == {"big": str(2**70), "half?": "?", "o": str(object), "b": [97, 98]}


class Kind(str, Enum):
    A = "a"


def test_a_value_is_what_its_type_is_made_of():
    given = {
        "text": Kind.A,
        "float": np.float64(0.5),
        "number": IntEnum("Number", "A").A,
        "yes": True,
        "tuple": (1, "b"),
    }
    wanted = {"text": "a", "float": 0.5, "number": 1, "yes": True, "tuple": [1, "b"]}
    assert decode(encode(span("a", 0, 1, attributes=given)), "").attributes == wanted


def test_long_texts_and_many_attributes():
    long = span("a", 0, 1, attributes={f"key {number}": "x" * number for number in (127, 128, 16_383, 16_384, 300_000)})
    assert decode(encode(long), long.service) == long


@pytest.mark.parametrize("rubbish", [b"", b"{}", b"\x0a\x10short", encode(request()[0])[2:]])
def test_the_trace_id_of_something_else_is_none(rubbish):
    assert trace_id_of(rubbish) is None
    assert trace_id_of(encode(request()[0])) == TRACE
