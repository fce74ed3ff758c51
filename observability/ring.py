"""The traces of the last requests, whole, in memory: bounded in number and in bytes, the oldest forgotten first.

Spans come one by one and in any order, from several processes; a request is told when it has ended. Requests of one
caller may share a trace. Knows no HTTP, no exporter and nothing of what spans say. Every method may be called from any
thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_SPANS = 256  # of one trace: a caller may go on for ever under one id
SPAN_OVERHEAD = 128  # bytes that a held span takes beside its own
TRACE_OVERHEAD = 800


class Held(NamedTuple):
    """A span as `observability.encoded` has it."""

    service: str
    sampled: bool
    encoded: bytes


class Ended(NamedTuple):
    """A request that has ended, as the list of traces shows it."""

    trace_id: str
    span_id: str  # of its server span
    request_id: str
    pipeline: str
    operation: str
    status: int
    reason: str  # error.type, or ""
    started_ns: int
    duration_ms: float
    kept: str = ""  # why its trace is exported: sampled, slow, failed, cancelled; "" if it is not


@dataclass
class _Trace:
    spans: deque[Held] = field(default_factory=deque)
    requests: list[Ended] = field(default_factory=list)
    bytes: int = TRACE_OVERHEAD
    claimed: bool = False


class Ring:
    def __init__(self, max_traces: int, max_bytes: int) -> None:
        self._max_traces = max_traces
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._running: OrderedDict[str, _Trace] = OrderedDict()
        self._ended: OrderedDict[str, _Trace] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._running) + len(self._ended)

    def add(self, trace_id: str, span: Held) -> bool:
        """Keeps a span; True if its trace was claimed, so that whoever did has yet to be given it."""
        with self._lock:
            trace = self._ended.get(trace_id) or self._running.get(trace_id)
            if trace is None:
                trace = self._running[trace_id] = _Trace()
                self.bytes += trace.bytes
            self._grow(trace, len(span.encoded) + SPAN_OVERHEAD)
            trace.spans.append(span)
            if len(trace.spans) > MAX_SPANS:
                self._grow(trace, -len(trace.spans.popleft().encoded) - SPAN_OVERHEAD)
            self._forget()
            return trace.claimed

    def end(self, request: Ended) -> None:
        """A request has ended; spans of it may still come."""
        with self._lock:
            trace = self._ended.pop(request.trace_id, None) or self._running.pop(request.trace_id, None)
            if trace is None:
                trace = _Trace()
                self.bytes += trace.bytes
            self._ended[request.trace_id] = trace
            trace.requests.append(request)
            del trace.requests[:-MAX_SPANS]
            self._forget()

    def claim(self, trace_id: str) -> list[Held]:
        """What is here of a trace, to the first who asks; of each later span `add` says that it was claimed."""
        with self._lock:
            trace = self._find(trace_id)
            if trace is None or trace.claimed:
                return []
            trace.claimed = True
            return list(trace.spans)

    def spans(self, trace_id: str) -> list[Held]:
        with self._lock:
            trace = self._find(trace_id)
            return list(trace.spans) if trace else []

    def requests(self) -> list[Ended]:
        """Those that have ended and are still here, the latest first."""
        with self._lock:
            found = [request for trace in self._ended.values() for request in trace.requests]
        return sorted(found, key=lambda request: request.started_ns + request.duration_ms * 1e6, reverse=True)

    def _find(self, trace_id: str) -> _Trace | None:
        return self._ended.get(trace_id) or self._running.get(trace_id)

    def _grow(self, trace: _Trace, size: int) -> None:
        trace.bytes += size
        self.bytes += size

    def _forget(self) -> None:
        """Ended traces first: what still runs is wanted whole. One that never ends here (a caller's own trace, by
        gRPC alone) goes when there are too many of its kind."""
        while len(self._running) > self._max_traces:
            self._drop(self._running)
        while len(self._ended) > self._max_traces or (self.bytes > self._max_bytes and self._ended):
            self._drop(self._ended)
        while self.bytes > self._max_bytes and self._running:
            self._drop(self._running)

    def _drop(self, traces: OrderedDict[str, _Trace]) -> None:
        _, trace = traces.popitem(last=False)
        self.bytes -= trace.bytes
