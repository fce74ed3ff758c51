"""The traces that are kept, over HTTP: listed, and shown to whoever administers the gateway.

Decides nothing about a trace: `observability.keeping` does.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from gateway.access import may_administer
from gateway.errors import ApiError
from gateway.state import state_of
from observability import spans
from observability.encoded import decode
from observability.keeping import Traces
from observability.ring import Ended

SETTLE_S = 0.25  # after a request's end, for its stages' last spans to come
_LISTED = 100
_TRACE_ID = re.compile(r"[0-9a-f]{32}")


async def list_traces(request: Request) -> Response:
    traces = _traces(request.scope)
    text = request.query_params.get("limit", str(_LISTED))
    if not (text.isascii() and text.isdecimal()):
        raise ApiError(400, "'limit' must be a number, 0 or more.", code="invalid_request", param="limit")
    listed = [_listed(ended) for ended in traces.ring.requests()[: int(text[:9])]]
    return _json(orjson.dumps({"object": "list", "data": listed}))


async def get_trace(request: Request) -> Response:
    """OTLP JSON: all spans of a trace id, or those of one request by its request id."""
    traces = _traces(request.scope)
    id: str = request.path_params["id"]
    ended = _find(traces, id)
    if ended:
        await _settled(ended)
    held = traces.of_request(ended) if ended and id != ended.trace_id else traces.ring.spans(id)
    if not held:
        raise _no_trace(id)
    return _json(spans.document(decode(span.encoded, span.service) for span in held))


async def get_usual(request: Request) -> Response:
    """The medians by stage of the pipeline's other recent requests: what this one is judged by."""
    traces = _traces(request.scope)
    ended = _find(traces, request.path_params["id"])
    stages, requests = traces.usual(ended.pipeline, but=ended.span_id) if ended and ended.pipeline else ({}, 0)
    pipeline = ended.pipeline if ended else ""
    return _json(orjson.dumps({"pipeline": pipeline, "requests": requests, "stages_ms": stages}))


async def get_recording(request: Request) -> Response:
    """The tensors of one request at every boundary between stages, as a file (`pipelines.recording`)."""
    traces, state = _traces(request.scope), state_of(request.scope)
    if not state["settings"].record:
        raise ApiError(404, "Nothing is recorded: start the gateway with TRIPTYCH_RECORD=16, or so.", code="not_found")
    id: str = request.path_params["id"]
    ended = _find(traces, id)
    if ended is None:
        raise _no_trace(id)
    told = [decode(held.encoded, held.service) for held in traces.of_request(ended)]
    above = next((span.span_id for span in told if span.kind == "client"), "")  # the stages' spans are below it
    file = await state["backend"].recording(ended.pipeline, f"{ended.trace_id}-{above}") if above else b""
    if not file:
        raise ApiError(
            404,
            f"Nothing is recorded of '{id[:80]}': it was refused before generate, it did not fit into "
            "TRIPTYCH_RECORD_MB, or later ones have taken its place (TRIPTYCH_RECORD).",
            code="not_found",
            param="id",
        )
    return Response(file, media_type="application/octet-stream")


TRACE_ROUTES = [
    Route("/admin/traces", list_traces),
    Route("/admin/traces/{id:path}/usual", get_usual),  # a client's request id may hold slashes
    Route("/admin/traces/{id:path}/recording", get_recording),
    Route("/admin/traces/{id:path}", get_trace),
]


def _traces(scope: Scope) -> Traces:
    if not may_administer(scope):
        raise ApiError(
            403, "Traces are shown to this machine alone, and to whoever has the admin key.", code="forbidden"
        )
    traces = state_of(scope)["traces"]
    if traces is None:
        raise ApiError(404, "No traces are kept: TRIPTYCH_TRACE_RING is 0, or tracing is off.", code="not_found")
    return traces


def _find(traces: Traces, id: str) -> Ended | None:
    """The latest request of that trace id, of that request id, or the one of that server span."""
    requests = traces.ring.requests()
    return next((ended for ended in requests if id in (ended.trace_id, ended.request_id, ended.span_id)), None)


async def _settled(ended: Ended) -> None:
    since_s = time.time() - (ended.started_ns / 1e9 + ended.duration_ms / 1e3)
    if 0 <= since_s < SETTLE_S:
        await asyncio.sleep(SETTLE_S - since_s)


def _listed(ended: Ended) -> Mapping[str, Any]:
    started = datetime.fromtimestamp(ended.started_ns / 1e9, timezone.utc).isoformat(timespec="milliseconds")
    return {
        "id": ended.trace_id,
        "request_id": ended.request_id,
        "span_id": ended.span_id,
        "pipeline": ended.pipeline or None,
        "operation": ended.operation,
        "status": ended.status,
        "reason": ended.reason or None,
        "started": started.replace("+00:00", "Z"),
        "duration_ms": round(ended.duration_ms, 3),
        "kept": ended.kept or "recent",
    }


def _no_trace(id: str) -> ApiError:
    what = "trace" if _TRACE_ID.fullmatch(id) else "request"
    return ApiError(404, f"No {what} '{id[:80]}' is kept: older ones have made room.", code="not_found", param="id")


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
