"""Spans survive their OTLP JSON, whatever is in them; a document of spans is what OTLP/HTTP takes."""

from __future__ import annotations

import math

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from observability import spans
from observability.spans import Event, Link, SpanData
from tests.otlp_receiver import _from_json
from tests.spans import request, span

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_PLAIN = st.one_of(_TEXT, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
_ATTRIBUTES = st.dictionaries(_TEXT, st.one_of(_PLAIN, st.lists(_PLAIN, max_size=3)), max_size=5)
_TIME = st.integers(0, 2**63 - 1)
_HEX = "0123456789abcdef"
_TRACE_ID, _SPAN_ID = st.text(_HEX, min_size=32, max_size=32), st.text(_HEX, min_size=16, max_size=16)
_SPANS = st.builds(
    SpanData,
    trace_id=_TRACE_ID,
    span_id=_SPAN_ID,
    parent_id=st.one_of(st.just(""), _SPAN_ID),
    name=_TEXT,
    kind=st.sampled_from(spans.KINDS),
    start_ns=_TIME,
    end_ns=_TIME,
    service=_TEXT,
    sampled=st.booleans(),
    attributes=_ATTRIBUTES,
    events=st.lists(st.builds(Event, _TEXT, _TIME, _ATTRIBUTES), max_size=2),
    links=st.lists(st.builds(Link, _TRACE_ID, _SPAN_ID), max_size=2),
    error=st.one_of(st.none(), _TEXT),
)


@given(st.lists(_SPANS, max_size=4))
def test_a_document_holds_every_span_with_its_service(originals):
    document = spans.document(originals)
    read = spans.read_document(document)
    assert sorted(map(repr, read)) == sorted(map(repr, originals))
    assert [span.start_ns for span in read] == sorted(span.start_ns for span in read)


def test_a_collector_reads_the_document():
    document = spans.document(request())
    received = _from_json(document)
    assert {span.service for span in received} == {"triptych-gateway", "triptych-preprocess", "triptych-generate"}
    root = next(span for span in received if not span.parent_id)
    assert (root.name, root.kind, root.attributes) == ("POST /v1", "server", {"triptych.request_id": "req_1"})


def test_what_json_cannot_say_is_said_as_proto3_has_it():
    odd = span("a", 0, 1, attributes={"n": math.nan, "i": -math.inf, "big": 2**70, "half": "\ud83d", "o": object})
    document = orjson.loads(spans.document([odd]))
    (listed,) = document["resourceSpans"][0]["scopeSpans"][0]["spans"]
    told = {item["key"]: item["value"] for item in listed["attributes"]}
    assert told["n"] == {"doubleValue": "NaN"}
    assert told["i"] == {"doubleValue": "-Infinity"}
    assert told["big"] == {"stringValue": str(2**70)}
    assert told["half"] == {"stringValue": "?"}
    assert math.isnan(spans.read_document(document)[0].attributes["n"])


@pytest.mark.parametrize("rubbish", ["[]", "{}", '{"resourceSpans":[{"scopeSpans":[{"spans":[{}]}]}]}', "x", '"a"'])
def test_what_is_no_document_is_refused(rubbish):
    with pytest.raises(ValueError, match=r"OTLP|JSON|unexpected|expected"):
        spans.read_document(rubbish)
