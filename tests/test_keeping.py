"""Which traces are exported for their end, with every span of theirs, and what a pipeline's usual is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from observability.encoded import decode, encode
from observability.keeping import ENOUGH, PER_TOKEN, Traces, medians, stage_times, subtree
from observability.ring import Ring
from observability.spans import SpanData
from tests.spans import request, span, span_id
from tests.test_ring import ended

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def exported() -> list[SpanData]:
    return []


@pytest.fixture
def traces(exported) -> Traces:
    def export(service: str, encoded: bytes) -> None:
        exported.append(decode(encoded, service))

    return Traces(Ring(1000, 10_000_000), export, slow_ms=1000)


def collect(traces: Traces, one: SpanData) -> None:
    traces.take(one.trace_id, one.service, one.sampled, encode(one))


def end(traces: Traces, *, sampled: bool = False, failed: bool = False, cancelled: bool = False, **changes) -> str:
    told = ended(TRACE)._replace(span_id=span_id("POST /v1"), **changes)
    return traces.end(told, sampled=sampled, failed=failed, cancelled=cancelled).kept


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({}, ""),
        ({"failed": True, "status": 500}, "failed"),
        ({"cancelled": True, "status": 499}, "cancelled"),
        ({"duration_ms": 1001.0}, "slow"),
        ({"duration_ms": 1001.0, "pipeline": ""}, ""),  # of no known model: there is nothing it is slow for
    ],
)
def test_a_trace_that_was_not_sampled_is_exported_whole_if_it_ends_badly(traces, exported, how, kept):
    spans = [replace(one, sampled=False) for one in request()]
    for one in spans[:8]:
        collect(traces, one)
    assert end(traces, **how) == kept
    for one in spans[8:]:  # from other processes, after the end
        collect(traces, one)
    assert exported == (spans if kept else [])


def test_a_sampled_trace_is_exported_by_those_who_end_its_spans(traces, exported):
    for one in request():
        collect(traces, one)
    assert end(traces, sampled=True, failed=True) == "failed"
    assert end(traces, sampled=True) == "sampled"
    assert exported == []


def test_what_triton_traced_is_exported_if_the_trace_is_sampled(traces, exported):
    """It exports to nobody else, and knows not whether it should."""
    tritons = [span(f"triton {number}", 0, 1) for number in range(3)]
    others = [replace(one, sampled=True) for one in request()]
    traces.adopt(tritons[0])  # before any of the others is there
    assert exported == []
    for one in others:
        collect(traces, one)
    traces.adopt(tritons[1])
    assert exported == [tritons[1]]
    assert end(traces, sampled=True) == "sampled"
    traces.adopt(tritons[2])
    assert sorted(one.name for one in exported) == ["triton 0", "triton 1", "triton 2"]


def test_what_triton_traced_of_an_unsampled_trace_is_kept_alone(traces, exported):
    for one in request():
        collect(traces, replace(one, sampled=False))
    traces.adopt(span("triton compute", 0, 1))
    assert end(traces) == ""
    assert exported == []
    assert len(traces.ring.spans(TRACE)) == len(request()) + 1


def test_slow_is_over_the_p95_of_enough_good_requests(traces):
    for number in range(ENOUGH):
        assert end(traces, duration_ms=10.0 + number % 10) == ""
        assert end(traces, duration_ms=900.0, status=500, failed=True) == "failed"  # says nothing of the usual
    assert end(traces, duration_ms=19.0) == ""
    assert end(traces, duration_ms=20.0) == "slow"
    assert end(traces, duration_ms=20.0, pipeline="other") == ""


def test_several_requests_of_one_trace_are_told_apart(traces):
    caller = span("agent", 0, 1000)
    for number in range(2):
        for one in request():
            own = {
                "span_id": f"{one.span_id[:15]}{number}",
                "parent_id": one.parent_id and f"{one.parent_id[:15]}{number}",
            }
            above = {} if one.parent_id else {"parent_id": caller.span_id}
            collect(traces, replace(one, **{**own, **above}))
    first = ended(TRACE)._replace(span_id=span_id("POST /v1")[:15] + "0")
    assert len(traces.ring.spans(TRACE)) == 2 * len(request())
    assert len(traces.of_request(first)) == len(request())


def test_the_usual_is_the_median_of_other_good_requests(traces):
    for number, prefill_ms in enumerate([10, 20, 90, 5000]):
        trace_id = f"{number:032x}"
        for one in request(prefill_ms=prefill_ms):
            collect(traces, replace(one, trace_id=trace_id))
        told = ended(trace_id, number)._replace(span_id=span_id("POST /v1"), status=500 if number == 3 else 200)
        traces.end(told, sampled=False, failed=number == 3, cancelled=False)
    stages, requests = traces.usual("echo")
    assert (stages["prefill"], requests) == (20, 3)
    assert traces.usual("other") == ({}, 0)
    assert traces.usual("echo", but=span_id("POST /v1")) == ({}, 0)


def test_times_are_of_the_choice_that_took_longest_and_of_work_not_of_waiting():
    spans = [*request(decode_ms=100, tokens=11), span("decode", 0, 30, "generate", id="other"), span("x", 0, 9)]
    times = stage_times(spans)
    assert times["decode"] == 100
    assert times[PER_TOKEN] == 10
    assert times["postprocess"] == 2  # its span goes from the first token to the last
    assert set(times) == {"admission", "preprocess", "queue", "prefill", "decode", "postprocess", PER_TOKEN}
    assert medians([request(prefill_ms=ms) for ms in (1, 2, 30)])["prefill"] == 2


def test_a_subtree_ends_even_where_spans_are_each_others_parents():
    spans = [span("a", 0, 1, "b"), span("b", 0, 1, "a"), span("c", 0, 1)]
    assert {one.name for one in subtree(spans, span_id("a"))} == {"a", "b"}
    assert subtree(spans, "gone") == []
