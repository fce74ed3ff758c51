"""Jaeger's JSON: the documented shape for any spans, and the same tree and times."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from observability import jaeger
from observability.spans import Event, Link
from tests.spans import BEGAN, MS, TRACE, request, span, span_id
from tests.test_spans import _SPANS

SCHEMA = jsonschema.Draft202012Validator(json.loads((Path(__file__).parent / "jaeger.schema.json").read_text()))


@given(st.lists(_SPANS, max_size=5))
def test_any_spans_have_jaegers_shape(spans):
    for one in spans:
        one.end_ns = max(one.start_ns, one.end_ns)
    document = json.loads(json.dumps(jaeger.document(spans)))
    SCHEMA.validate(document)
    assert sum(len(trace["spans"]) for trace in document["data"]) == len(spans)
    for trace in document["data"]:
        assert {one["traceID"] for one in trace["spans"]} == {trace["traceID"]}
        assert {one["processID"] for one in trace["spans"]} == set(trace["processes"])


@pytest.mark.parametrize(
    "breaks",
    [
        lambda span: span.update(startTime=1.5),
        lambda span: span.update(spanID="xyz"),
        lambda span: span.pop("references"),
        lambda span: span["references"].append({"refType": "PARENT", "traceID": TRACE, "spanID": "0" * 16}),
        lambda span: span["tags"].append({"key": "n", "type": "int64", "value": "3"}),
    ],
)
def test_the_schema_refuses_what_jaeger_would(breaks):
    document = jaeger.document(request())
    breaks(document["data"][0]["spans"][3])
    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate(document)


def test_a_request_in_jaeger():
    failed = span("generate", 1, 3.5, "chat", error="no", service="triptych-generate")
    failed.attributes = {"error.type": "internal", "n": 3, "share": 0.5, "yes": True, "list": [1, 2]}
    failed.events = [Event("first text", BEGAN + 2 * MS, {"n": 1})]
    failed.links = [Link("ab" * 16, "cd" * 8)]
    (trace,) = jaeger.document([span("chat", 0, 4, kind="client"), failed])["data"]
    root, told = trace["spans"]
    assert (root["operationName"], root["references"], root["duration"]) == ("chat", [], 4000)
    assert told["references"] == [
        {"refType": "CHILD_OF", "traceID": TRACE, "spanID": span_id("chat")},
        {"refType": "FOLLOWS_FROM", "traceID": "ab" * 16, "spanID": "cd" * 8},
    ]
    assert (told["startTime"], told["duration"]) == (BEGAN // 1000 + 1000, 2500)
    assert trace["processes"][told["processID"]]["serviceName"] == "triptych-generate"
    tags = {tag["key"]: (tag["type"], tag["value"]) for tag in told["tags"]}
    assert tags == {
        "error.type": ("string", "internal"),
        "n": ("int64", 3),
        "share": ("float64", 0.5),
        "yes": ("bool", True),
        "list": ("string", "[1, 2]"),
        "span.kind": ("string", "internal"),
        "otel.scope.name": ("string", "triptych"),
        "otel.status_code": ("string", "ERROR"),
        "otel.status_description": ("string", "no"),
        "error": ("bool", True),
    }
    assert told["logs"] == [
        {
            "timestamp": BEGAN // 1000 + 2000,
            "fields": [
                {"key": "event", "type": "string", "value": "first text"},
                {"key": "n", "type": "int64", "value": 1},
            ],
        }
    ]
