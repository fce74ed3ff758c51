"""Triton's own spans as they are posted: renamed, their idle events left out; and what is no such post."""

from __future__ import annotations

import http.client
import json
import urllib.parse

import pytest

from observability.spans import SpanData
from observability.triton_spans import TritonSpans
from tests.product import wait_for

# As tritonserver 2.51 posts them, shortened.
POSTED = {
    "resourceSpans": [
        {
            "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "unknown_service"}}]},
            "scopeSpans": [
                {
                    "scope": {"name": "triton-server"},
                    "spans": [
                        {
                            "name": "InferRequest",
                            "kind": 2,
                            "traceId": "78211e4367b4095ac5f5e54f3e444e76",
                            "spanId": "3bea72060ec9f2b6",
                            "parentSpanId": "2128d25c58bec864",
                            "startTimeUnixNano": "1795916119000000000",
                            "endTimeUnixNano": "1795916119007000000",
                            "events": [
                                {"name": "GRPC_WAITREAD_START", "timeUnixNano": "1795916117000000000"},
                                {"name": "INFER_RESPONSE_COMPLETE", "timeUnixNano": "1795916119006000000"},
                                {"name": "REQUEST_END", "timeUnixNano": "1795916119007000000"},
                            ],
                        }
                    ],
                }
            ],
        }
    ]
}


@pytest.fixture
def taken():
    return []


@pytest.fixture
def receiver(taken: list[SpanData]):
    receiver = TritonSpans("triptych-triton", taken.append)
    yield receiver
    receiver.close()


def post(receiver: TritonSpans, body: bytes, path: str = "/v1/traces") -> int:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(receiver.url).netloc, timeout=10)
    connection.request("POST", path, body)
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_span_is_taken_under_a_name_that_is_no_stages(receiver, taken):
    assert post(receiver, json.dumps(POSTED).encode()) == 200
    wait_for(lambda: taken, 10)
    (span,) = taken
    assert (span.name, span.kind, span.service) == ("triton InferRequest", "server", "triptych-triton")
    assert (span.trace_id[:8], span.span_id, span.parent_id) == ("78211e43", "3bea72060ec9f2b6", "2128d25c58bec864")
    assert [event.name for event in span.events] == ["INFER_RESPONSE_COMPLETE"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"resourceSpans": 5}', b'{"resourceSpans": [{"scopeSpans": 1}]}'])
def test_what_cannot_be_read_does_not_keep_the_next_from_coming(receiver, taken, body):
    assert post(receiver, body) == 200
    assert post(receiver, json.dumps(POSTED).encode()) == 200
    wait_for(lambda: taken, 10)


def test_what_is_not_for_it_is_refused(receiver, taken):
    assert post(receiver, json.dumps(POSTED).encode(), "/elsewhere") == 400
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(receiver.url).netloc, timeout=10)
    connection.putrequest("POST", "/v1/traces")
    connection.putheader("Content-Length", str(2**40))  # nobody waits for it
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()
    assert taken == []
