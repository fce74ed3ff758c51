"""The OpenTelemetry SDK behind `observability.tracing`, which imports this file only once tracing is on.

Reads the OTEL_* variables that the SDK leaves to its user. What it cannot do is a RuntimeError with a remedy.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext

SCHEDULE_DELAY_MS = 500  # the SDK's 5 s would let a trace appear in the UI long after its request
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KINDS = {
    "internal": trace.SpanKind.INTERNAL,
    "server": trace.SpanKind.SERVER,
    "client": trace.SpanKind.CLIENT,
}


class Tracer:
    """Starts spans and exports them in the background."""

    def __init__(self, service_name: str) -> None:
        version = _version()
        self._exporter = _Counted(_exporter())
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": _named(service_name), "service.version": version}),
            shutdown_on_exit=False,  # the SDK's may hold an exit for 30 s; the caller's is bounded
        )
        delay = None if os.environ.get("OTEL_BSP_SCHEDULE_DELAY") else SCHEDULE_DELAY_MS
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter, schedule_delay_millis=delay))
        self._tracer = self._provider.get_tracer("triptych", version)
        self._lock = threading.Lock()
        self._ended = 0

    def start(
        self,
        name: str,
        kind: str,
        parent: SpanContext | None,
        attributes: Mapping[str, Any],
        start_ns: int | None,
    ) -> trace.Span | None:
        """A recording span, or None when it is not sampled."""
        context = Context()  # an empty one: no ambient span becomes a parent
        if parent is not None:
            context = trace.set_span_in_context(trace.NonRecordingSpan(parent), context)
        span = self._tracer.start_span(name, context, _KINDS[kind], attributes, start_time=start_ns)
        return span if span.is_recording() else None

    def end(self, span: trace.Span, end_ns: int | None) -> None:
        with self._lock:
            self._ended += 1
        span.end(end_time=end_ns)

    def fail(self, span: trace.Span, type: str, message: str) -> None:
        span.set_attribute("error.type", type)
        span.set_status(trace.Status(trace.StatusCode.ERROR, message or None))

    def remote_parent(self, traceparent: str) -> SpanContext | None:
        """The span context of a W3C traceparent; None if it is malformed."""
        match = _TRACEPARENT.fullmatch(traceparent.strip())
        if not match or match[1] == "ff" or (match[1] == "00" and match[5]):
            return None
        flags = trace.TraceFlags(int(match[4], 16))
        context = SpanContext(int(match[2], 16), int(match[3], 16), is_remote=True, trace_flags=flags)
        return context if context.is_valid else None

    def stats(self) -> dict[str, int]:
        exporter = self._exporter
        return {"ended": self._ended, "exported": exporter.exported, "failed": exporter.failed}

    def flush(self) -> None:
        self._provider.force_flush()

    def shutdown(self) -> None:
        self._provider.shutdown()


class _Counted(SpanExporter):
    """Counts what left and what did not. Exports are made one at a time, so plain integers do."""

    def __init__(self, inner: SpanExporter) -> None:
        self.inner = inner
        self.exported = 0
        self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self.inner.export(spans)
        except Exception:
            self.failed += len(spans)
            raise  # to the SDK's background thread, which logs it
        if result is SpanExportResult.SUCCESS:
            self.exported += len(spans)
        else:
            self.failed += len(spans)
        return result

    def shutdown(self) -> None:
        self.inner.shutdown()


def _exporter() -> SpanExporter:
    environ = os.environ
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = (protocol or "http/protobuf").strip().lower()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    if protocol == "grpc":
        try:
            grpc_exporter = importlib.import_module("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
        except ImportError:
            raise RuntimeError(
                "OTEL_EXPORTER_OTLP_PROTOCOL=grpc needs the package opentelemetry-exporter-otlp-proto-grpc: "
                "install it, or set http/protobuf and the collector's HTTP port, 4318."
            ) from None
        exporter: SpanExporter = grpc_exporter.OTLPSpanExporter()
        return exporter
    raise RuntimeError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} is not supported: use http/protobuf or grpc.")


def _named(service_name: str) -> str:
    """The user's own name (OTEL_SERVICE_NAME) replaces "triptych", and a stage keeps its suffix."""
    own = str(Resource.create().attributes.get("service.name", "unknown_service"))
    if own.startswith("unknown_service"):
        return service_name
    suffix = service_name.removeprefix("triptych").removeprefix("-gateway")
    return own + suffix


def _version() -> str:
    try:
        return importlib.metadata.version("triptych")
    except importlib.metadata.PackageNotFoundError:
        return "0"
