"""What Prometheus scrapes: the gateway's measurements, in one registry. Knows nothing of who takes them.

Names and buckets follow OpenTelemetry's GenAI conventions where those have one. Every label has few values.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from observability import tracing

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
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)

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
PROMPT_TOKENS = Counter(
    "triptych_prompt_tokens", "Tokens of the prompts of finished requests.", ["pipeline"], registry=REGISTRY
)
CACHED_PROMPT_TOKENS = Counter(
    "triptych_cached_prompt_tokens", "Those of them that were not computed again.", ["pipeline"], registry=REGISTRY
)
OUTPUT_TOKENS = Counter("triptych_output_tokens", "Tokens sent to clients.", ["pipeline"], registry=REGISTRY)
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
CONNECTIONS_ENDED = Counter(
    "triptych_connections_ended",
    "Connections that the gateway ended for what the client did, by reason.",
    ["reason"],
    registry=REGISTRY,
)
LANE_MESSAGES = Counter("triptych_lane_messages", "Messages received on lanes.", ["pipeline"], registry=REGISTRY)
PIPELINE_READY = Gauge(
    "triptych_pipeline_ready", "1 when the pipeline can answer, else 0.", ["pipeline"], registry=REGISTRY
)

_ENGINE_GAUGES = {
    "running": "Sequences in the engine's step.",
    "waiting": "Sequences waiting for a place in it.",
}
_ENGINE_COUNTERS = {
    "steps": "Forward passes.",
    "prompt_tokens": "Prompt tokens computed.",
    "output_tokens": "Tokens generated.",
    "finished": "Sequences that finished.",
    "cancelled": "Sequences that were cancelled.",
}


class _Engine(Collector):
    """The engines' own counters, passed on as they are: an engine that restarts is a counter reset."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: dict[str, dict[str, float]] = {}

    def update(self, pipeline: str, counters: Mapping[str, float]) -> None:
        with self._lock:
            self._latest[pipeline] = dict(counters)

    def forget(self, pipeline: str) -> None:
        with self._lock:
            self._latest.pop(pipeline, None)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            latest = dict(self._latest)
        families: list[tuple[str, Metric]] = []
        for name, text in _ENGINE_GAUGES.items():
            families.append((name, GaugeMetricFamily(f"triptych_engine_{name}", text, labels=["pipeline"])))
        for name, text in _ENGINE_COUNTERS.items():
            families.append((name, CounterMetricFamily(f"triptych_engine_{name}", text, labels=["pipeline"])))
        for name, family in families:
            for pipeline, counters in latest.items():
                if name in counters:
                    family.add_metric([pipeline], counters[name])  # type: ignore[attr-defined]
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


def engine_counters(pipeline: str, counters: Mapping[str, float]) -> None:
    """The engine's own latest values of the gauges and counters named above; others are ignored."""
    _ENGINE.update(pipeline, counters)


def forget_engine(pipeline: str) -> None:
    """Its engine is gone; the series end instead of standing still."""
    _ENGINE.forget(pipeline)


def render(accept: str = "") -> tuple[bytes, str]:
    """The body and its content type; OpenMetrics, which has exemplars, for whoever accepts it."""
    encode, content_type = choose_encoder(accept)
    body: bytes = encode(REGISTRY)
    return body, content_type
