"""What Prometheus scrapes: the gateway's measurements, in one registry. Knows nothing of who takes them.

Names and buckets follow OpenTelemetry's GenAI conventions where those have one. Every label has few values: a
pipeline's name is one of the catalog's, or empty. docs/metrics.md says what each is for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from observability import tracing
from observability.tracing import Span

# The conventions' buckets. A CPU's first token may take longer than theirs, an echo's or a GPU's token less.
_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_WAIT = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STAGE = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)
_LAG = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, that nobody asks for
REGISTRY = CollectorRegistry(auto_describe=True)

REQUEST_SECONDS = Histogram(
    "gen_ai_server_request_duration_seconds",
    "From the request's first byte to the response's last.",
    ["pipeline", "operation", "status"],
    buckets=_DURATION,
    registry=REGISTRY,
)
FIRST_TOKEN_SECONDS = Histogram(
    "gen_ai_server_time_to_first_token_seconds",
    "From the request to its first token.",
    ["pipeline"],
    buckets=_FIRST_TOKEN,
    registry=REGISTRY,
)
TIME_PER_OUTPUT_TOKEN_SECONDS = Histogram(
    "gen_ai_server_time_per_output_token_seconds",
    "A request's mean time between tokens after its first.",
    ["pipeline"],
    buckets=_PER_TOKEN,
    registry=REGISTRY,
)
STAGE_SECONDS = Histogram(
    "triptych_stage_duration_seconds",
    "What each stage took of a finished request; of several choices, the longest.",
    ["pipeline", "stage"],
    buckets=_STAGE,
    registry=REGISTRY,
)
QUEUE_SECONDS = Histogram(
    "triptych_queue_wait_seconds",
    "How long requests waited to be admitted; in the engine's own queue: the stage `queue`.",
    ["pipeline"],
    buckets=_WAIT,
    registry=REGISTRY,
)
TOKENS = Counter(
    "triptych_tokens",
    "Tokens of finished requests: input, output, and what of the input was cached, not computed again.",
    ["pipeline", "type"],
    registry=REGISTRY,
)
CACHE_HITS = Counter(
    "triptych_cache_hits",
    "Finished requests whose prompt began with what was cached.",
    ["pipeline"],
    registry=REGISTRY,
)
IN_FLIGHT = Gauge(
    "triptych_requests_in_flight", "Requests admitted and not yet answered.", ["pipeline"], registry=REGISTRY
)
QUEUED = Gauge("triptych_requests_queued", "Requests waiting to be admitted.", ["pipeline"], registry=REGISTRY)
ABORTED = Counter(
    "triptych_requests_aborted",
    "Requests that ended before their answer did, by reason.",
    ["pipeline", "reason"],
    registry=REGISTRY,
)
RETRIED = Counter(
    "triptych_requests_retried",
    "Choices that were asked again, since what worked on them was lost before they had said anything.",
    ["pipeline"],
    registry=REGISTRY,
)
CONNECTIONS_ENDED = Counter(
    "triptych_connections_ended",
    "Connections that the gateway ended for what the client did, by reason.",
    ["reason"],
    registry=REGISTRY,
)
IMAGES = Counter(
    "triptych_images", "Pictures read, once for each choice that they were read for.", ["pipeline"], registry=REGISTRY
)
IMAGE_BYTES = Counter(
    "triptych_image_bytes", "What they were decoded to: three bytes a pixel.", ["pipeline"], registry=REGISTRY
)
BLOCKED_SECONDS = Counter(
    "triptych_sse_blocked_seconds", "Time that streams waited for slow clients.", ["pipeline"], registry=REGISTRY
)
LANE_LAG_SECONDS = Histogram(
    "triptych_lane_lag_seconds",
    "From the orchestrator's sending of a lane message to its reading here.",
    ["pipeline"],
    buckets=_LAG,
    registry=REGISTRY,
)
SUPERVISOR_EVENTS = Counter(
    "triptych_supervisor_events",
    "What the supervisor saw and did: stub_died, …_hung, …_unhealthy, repaired, repair_failed, triton_hung, …_died.",
    ["pipeline", "event"],
    registry=REGISTRY,
)
LIFECYCLE_TRANSITIONS = Counter(
    "triptych_lifecycle_transitions",
    "A pipeline's changes of state, by the one it came to.",
    ["pipeline", "state"],
    registry=REGISTRY,
)
LIFECYCLE_STATE = Gauge(
    "triptych_lifecycle_state", "1 for the state that a pipeline is in.", ["pipeline", "state"], registry=REGISTRY
)
LOAD_SECONDS = Histogram(
    "triptych_load_phase_duration_seconds",
    "What each phase of a pipeline's loads took.",
    ["pipeline", "phase"],
    buckets=_WAIT,
    registry=REGISTRY,
)
COLD_STARTS = Histogram(
    "triptych_cold_start_seconds",
    "How long requests waited for a pipeline that was not ready.",
    ["pipeline"],
    buckets=_WAIT,
    registry=REGISTRY,
)
MEMORY_BYTES = Gauge(
    "triptych_memory_bytes",
    "Memory for pipelines: what there is of ram and gpu, and what of it is reserved.",
    ["kind", "of"],
    registry=REGISTRY,
)
LOG_LINES_DROPPED = Counter(
    "triptych_log_lines_dropped",
    "Lines of Triton's log that were not told here, since they came too fast; its file has them.",
    registry=REGISTRY,
)
LANE_MESSAGES = Counter("triptych_lane_messages", "Messages received on lanes.", ["pipeline"], registry=REGISTRY)
PIPELINE_READY = Gauge(
    "triptych_pipeline_ready", "1 when the pipeline can answer, else 0.", ["pipeline"], registry=REGISTRY
)

ENDPOINT_READY = Gauge(
    "triptych_endpoint_ready",
    "With several Tritons: 1 where the pipeline can answer now, else 0.",
    ["endpoint", "pipeline"],
    registry=REGISTRY,
)
ENDPOINT_IN_FLIGHT = Gauge(
    "triptych_endpoint_requests_in_flight",
    "With several Tritons: choices that each is at work on for this gateway.",
    ["endpoint"],
    registry=REGISTRY,
)
ENDPOINT_EJECTIONS = Counter(
    "triptych_endpoint_ejections",
    "With several Tritons: how often each was left alone for a while, since it had lost requests or failed them.",
    ["endpoint", "pipeline"],
    registry=REGISTRY,
)

_ENGINE_GAUGES = {
    "running": "Sequences in the engine's step.",
    "waiting": "Sequences waiting for a place in it.",
}
_ENGINE_COUNTERS = {
    "steps": "Forward passes.",
    "step_ns": "Time in them.",
    "step_rows": "Sequences in them: over the steps, the mean batch size.",
    "compiled_steps": "Forward passes by compiled code.",
    "prompt_tokens": "Tokens of the prompts that were admitted.",
    "cached_tokens": "Those of them that were not computed again.",
    "output_tokens": "Tokens generated.",
    "finished": "Sequences that finished.",
    "cancelled": "Sequences that were cancelled.",
    "preempted": "Running sequences that had to wait again for room.",
}


class _Engine(Collector):
    """The engines' own counters, passed on as they are: an engine that restarts is a counter reset."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: dict[tuple[str, str], dict[str, float]] = {}  # by pipeline and endpoint

    def update(self, pipeline: str, counters: Mapping[str, float], endpoint: str) -> None:
        with self._lock:
            self._latest[pipeline, endpoint] = dict(counters)

    def forget(self, pipeline: str, endpoint: str) -> None:
        with self._lock:
            self._latest.pop((pipeline, endpoint), None)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            latest = dict(self._latest)
        families: list[tuple[str, Metric]] = []
        for name, text in _ENGINE_GAUGES.items():
            families.append((name, GaugeMetricFamily(f"triptych_engine_{name}", text, labels=["pipeline"])))
        for name, text in _ENGINE_COUNTERS.items():
            shown = name.replace("_ns", "_seconds")
            families.append((name, CounterMetricFamily(f"triptych_engine_{shown}", text, labels=["pipeline"])))
        for name, family in families:
            scale = 1e-9 if name.endswith("_ns") else 1
            total = "_total" if family.type == "counter" else ""
            for (pipeline, endpoint), counters in latest.items():
                if name in counters:
                    labels = {"pipeline": pipeline, **({"endpoint": endpoint} if endpoint else {})}
                    family.add_sample(family.name + total, labels, counters[name] * scale)
            yield family


class _Spans(Collector):
    """What became of this process's spans: an incomplete trace has its cause here."""

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily("triptych_spans", "Spans of this process, by outcome.", labels=["outcome"])
        for outcome, count in tracing.stats().items():
            family.add_metric([outcome], count)
        yield family


_ENGINE = _Engine()
REGISTRY.register(_ENGINE)
REGISTRY.register(_Spans())
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)


def exemplar(span: Span) -> dict[str, str] | None:
    """What leads from a measurement to its trace, if the request is sampled: else nobody could look at it."""
    traceparent = span.traceparent
    if not traceparent or not int(traceparent[-2:], 16) & 1:
        return None
    return {"trace_id": str(span.trace_id)}


def engine_counters(pipeline: str, counters: Mapping[str, float], endpoint: str = "") -> None:
    """The engine's own latest values of the gauges and counters named above; others are ignored.

    Where a pipeline has several engines, each has an endpoint's name.
    """
    _ENGINE.update(pipeline, counters, endpoint)


def lifecycle_state(pipeline: str, before: str, now: str) -> None:
    LIFECYCLE_TRANSITIONS.labels(pipeline, now).inc()
    LIFECYCLE_STATE.labels(pipeline, before).set(0)
    LIFECYCLE_STATE.labels(pipeline, now).set(1)


def forget_engine(pipeline: str, endpoint: str = "") -> None:
    """Its engine is gone; the series end instead of standing still."""
    _ENGINE.forget(pipeline, endpoint)


def render(accept: str = "") -> tuple[Iterator[bytes], str]:
    """The body, piece by piece, and its content type; OpenMetrics, which has exemplars, for whoever accepts it.

    Each piece is a family, as it is when it is asked for: all of them at once take ten milliseconds and more, in which
    a gateway that is asked by every scraper would serve nobody.
    """
    encode, content_type = choose_encoder(accept)
    end = b"# EOF\n" if content_type.startswith("application/openmetrics") else b""
    return _pieces(encode, end), content_type


def _pieces(encode: Callable[[Collector], bytes], end: bytes) -> Iterator[bytes]:
    for family in REGISTRY.collect():
        yield encode(_Family(family)).removesuffix(end)
    yield end


class _Family(Collector):
    """A registry of one, for an encoder."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family
