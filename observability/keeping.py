"""Which traces are exported for how they ended, and what is usual: the ring, and who judges what goes into it.

Knows no HTTP and no exporter: `export` is given a service and an encoded span of its, of a trace that was not sampled
and is wanted after all.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from observability.encoded import decode, encode
from observability.ring import Ended, Held, Ring
from observability.spans import SpanData

# What a request passes through, in the order in which it does: names of spans, and of times in Server-Timing.
STAGES = ("admission", "preprocess", "queue", "prefill", "decode", "postprocess")

# Below the admission of a request that found its pipeline cold, and clipped to it: a load may be older than whoever
# joins it. Its phases in order, and how long each took, are attributes: as spans they would not fit on a screen.
LOAD, LOAD_PHASES, LOAD_PHASES_MS = "model.load", "triptych.load.phases", "triptych.load.phases_ms"

TRITON = "triton "  # begins the names of Triton's own spans: its models have the stages' names

PER_TOKEN = "decode per token"  # beside them: an answer that is long is not slow

RECENT = 200  # requests of a pipeline that its p95 is of
ENOUGH = 50  # fewer say nothing of a 95th percentile
USUAL_OF = 64  # requests that the usual is the median of
_REVIEW_EVERY = 10


class Durations:
    """The durations of a pipeline's last good requests, and their 95th percentile."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._added = 0
        self.p95 = math.inf  # until there are enough

    def add(self, ms: float) -> None:
        self._recent.append(ms)
        self._added += 1
        if len(self._recent) >= ENOUGH and self._added % _REVIEW_EVERY == 0:
            self.p95 = sorted(self._recent)[int(len(self._recent) * 0.95)]


class Traces:
    """All requests' traces: kept in the ring; of those that ended badly every span goes to `export` too."""

    def __init__(self, ring: Ring, export: Callable[[str, bytes], object], *, slow_ms: float = 0) -> None:
        self.ring = ring
        self._export = export
        self._slow_ms = slow_ms or math.inf
        self._lock = threading.Lock()
        self._durations: dict[str, Durations] = {}

    def take(self, trace_id: str, service: str, sampled: bool, encoded: bytes) -> None:
        """A span of any process. Those that are sampled are exported by the process that ended them."""
        held = Held(service, sampled, encoded)
        if self.ring.add(trace_id, held) and not sampled:
            self._export(service, encoded)

    def adopt(self, span: SpanData) -> None:
        """A span of a process that exports none itself, and does not know what is sampled: it is if others of its trace
        are, which may be known only when the request ends."""
        sampled = any(held.sampled for held in self.ring.spans(span.trace_id))
        encoded = encode(replace(span, sampled=sampled))
        if sampled:
            self._export(span.service, encoded)
        self.take(span.trace_id, span.service, sampled, encoded)

    def end(self, request: Ended, *, sampled: bool, failed: bool, cancelled: bool) -> Ended:
        """A request has ended; answers it with why its trace is kept."""
        bad = "failed" if failed else "cancelled" if cancelled else ""
        kept = bad or ("slow" if self._is_slow(request, good=not bad and request.status < 400) else "")
        request = request._replace(kept=kept or ("sampled" if sampled else ""))
        self.ring.end(request)
        if request.kept:
            for held in self.ring.claim(request.trace_id):
                if not held.sampled:
                    self._export(held.service, held.encoded)
        return request

    def _is_slow(self, request: Ended, *, good: bool) -> bool:
        if not request.pipeline:
            return False
        with self._lock:
            durations = self._durations.setdefault(request.pipeline, Durations())
            slow = request.duration_ms > min(durations.p95, self._slow_ms)
            if good:
                durations.add(request.duration_ms)
        return slow

    def of_request(self, request: Ended) -> list[Held]:
        """The spans of one request: a caller's trace may hold several."""
        found = [(held, decode(held.encoded, held.service)) for held in self.ring.spans(request.trace_id)]
        wanted = {span.span_id for span in subtree([span for _, span in found], request.span_id)}
        return [held for held, span in found if span.span_id in wanted]

    def usual(self, pipeline: str, *, but: str = "") -> tuple[dict[str, float], int]:
        """The medians of the last good requests' stages, and of how many; `but` is the span id of one left out."""
        recent = [
            request
            for request in self.ring.requests()
            if request.pipeline == pipeline and request.status < 400 and not request.reason and request.span_id != but
        ][:USUAL_OF]
        decoded = [[decode(held.encoded, held.service) for held in self.of_request(request)] for request in recent]
        return medians(decoded), len(recent)


def subtree(spans: Sequence[SpanData], span_id: str) -> list[SpanData]:
    """The span of that id and all below it."""
    children: dict[str, list[SpanData]] = {}
    for span in spans:
        children.setdefault(span.parent_id, []).append(span)
    found = [span for span in spans if span.span_id == span_id][:1]
    seen = {span_id}
    for span in found:  # grows as it is read
        for child in children.get(span.span_id, ()):
            if child.span_id not in seen:
                seen.add(child.span_id)
                found.append(child)
    return found


def stage_times(spans: Iterable[SpanData]) -> dict[str, float]:
    """Milliseconds by stage, of the choice that took longest in it; "decode per token" beside the whole of it."""
    by_id = {span.span_id: span for span in spans}
    times: dict[str, float] = {}
    for span in by_id.values():
        if span.name not in STAGES or span.error is not None:
            continue
        busy = span.attributes.get("triptych.busy_ms")  # of one that is called again and again, beside the others
        _longest(times, span.name, busy if isinstance(busy, float) else span.duration_ms)
        above = by_id.get(span.parent_id)
        tokens = above.attributes.get("gen_ai.usage.output_tokens", 0) if above else 0
        if span.name == "decode" and isinstance(tokens, int) and tokens > 1:
            _longest(times, PER_TOKEN, span.duration_ms / (tokens - 1))
    return times


def medians(requests: Iterable[Iterable[SpanData]]) -> dict[str, float]:
    held: dict[str, list[float]] = {}
    for spans in requests:
        for stage, ms in stage_times(spans).items():
            held.setdefault(stage, []).append(ms)
    return {stage: statistics.median(times) for stage, times in held.items()}


def _longest(times: dict[str, float], stage: str, ms: float) -> None:
    times[stage] = max(ms, times.get(stage, 0.0))
