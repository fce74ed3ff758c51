"""The judge of traces: a whole one passes, and of each thing that can be wrong it says what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from observability.completeness import MOST_SPANS, STAGES, check
from observability.spans import SpanData
from tests.spans import MS, request, span, span_id


def moved(spans: list[SpanData], name: str, start_ms: float = 0, end_ms: float = 0) -> list[SpanData]:
    return [
        replace(one, start_ns=one.start_ns + int(start_ms * MS), end_ns=one.end_ns + int(end_ms * MS))
        if one.name == name
        else one
        for one in spans
    ]


def several_choices() -> list[SpanData]:
    """Two choices, the second a little later: each with stages of its own."""
    spans = request()
    again = [
        replace(one, span_id=f"ee{one.span_id[2:]}", parent_id=one.parent_id if above else f"ee{one.parent_id[2:]}")
        for one in spans[3:11]
        for above in [one.name in ("preprocess", "generate", "postprocess")]
    ]
    for one in again:
        one.start_ns, one.end_ns = one.start_ns + MS // 2, one.end_ns + MS // 2
    return spans + again


def without(name: str) -> list[SpanData]:
    return [one for one in request() if one.name != name]


def cancelled() -> list[SpanData]:
    spans = moved(request(), "decode", 0, 300)
    return [replace(one, attributes={"error.type": "disconnected"}) if not one.parent_id else one for one in spans]


@pytest.mark.parametrize(
    "spans", [request(), several_choices(), cancelled(), moved(request(), "admission", -1.5, -0.1)]
)
def test_a_whole_trace_is_whole(spans):
    assert check(spans, expect=STAGES) == []


def test_a_caller_outside_is_the_parent():
    spans = [replace(one, parent_id="1" * 16) if not one.parent_id else one for one in request()]
    assert check(spans, remote_parent="1" * 16) == []
    assert check(spans) == ["0 roots: "]


@pytest.mark.parametrize(
    ("spans", "complaint"),
    [
        ([], "0 traces"),
        (without("generate"), "queue is an orphan: there is no span " + span_id("generate")),
        (without("tokenize"), "no span is named tokenize"),
        ([*request(), span("second", 0, 1)], "2 roots: POST /v1, second"),
        ([*request(), request()[3]], "two spans have the same id"),
        ([*request(), span("x", 0, 1, "y"), span("y", 0, 1, "x")], "some spans are not below the root"),
        ([*request(), span("x", 1, 2, "chat m", trace_id="ab" * 16)], "2 traces"),
        (moved(request(), "render", 2.5, 0), "render ends before it starts"),
        (moved(request(), "prefill", -3.5, 0), "prefill is outside generate by 2.50 ms"),
        (moved(request(), "decode", 0, 2.5), "decode is outside generate by 2.50 ms"),
        (moved(request(), "decode", -50, 0), "stages and gaps are +50.00 ms off the total of POST /v1"),
        (moved(request(), "prefill", 0, 3), "stages and gaps are +3.00 ms off the total of POST /v1"),
        (
            [*request(), *(span(f"more{number}", 1, 2, "chat m") for number in range(14))],
            f"26 spans, of {MOST_SPANS} at most",
        ),
    ],
)
def test_what_is_wrong_is_said(spans, complaint):
    assert complaint in check(spans, expect=STAGES)


def test_stages_of_the_second_choice_are_counted_too():
    spans = several_choices()
    spans[-2] = replace(spans[-2], start_ns=spans[-2].start_ns - 50 * MS)
    assert spans[-2].name == "decode"
    assert check(spans) == ["stages and gaps are +50.00 ms off the total of POST /v1"]
