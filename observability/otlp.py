"""The OpenTelemetry SDK's exporters behind `observability.tracing`, which imports this file only to export.

Reads the OTEL_* variables that the SDK leaves to its user. What it cannot do is a RuntimeError with a remedy.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import threading
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, Status, StatusCode

from observability.spans import SCOPE, SpanData

SCHEDULE_DELAY_MS = 500  # the SDK's 5 s would let a trace appear in the UI long after its request
_KINDS = {
    "internal": trace.SpanKind.INTERNAL,
    "server": trace.SpanKind.SERVER,
    "client": trace.SpanKind.CLIENT,
}
_SAMPLED = trace.TraceFlags(trace.TraceFlags.SAMPLED)
_UNSET = Status()


class Exporter:
    """Exports spans in the background: the SDK's batches and protocols, without its tracer."""

    def __init__(self) -> None:
        self._exporter = _Counted(_exporter())
        delay = None if os.environ.get("OTEL_BSP_SCHEDULE_DELAY") else SCHEDULE_DELAY_MS
        self._batches = BatchSpanProcessor(self._exporter, schedule_delay_millis=delay)
        self._scope = InstrumentationScope(SCOPE, _version())
        self._lock = threading.Lock()
        self._ended = 0

    def export(self, span: SpanData) -> None:
        """From any thread; never waits."""
        with self._lock:
            self._ended += 1
        self._batches.on_end(self._readable(span))

    def stats(self) -> dict[str, int]:
        exporter = self._exporter
        return {"ended": self._ended, "exported": exporter.exported, "failed": exporter.failed}

    def flush(self) -> None:
        self._batches.force_flush()

    def shutdown(self) -> None:
        self._batches.shutdown()  # type: ignore[no-untyped-call]

    def _readable(self, span: SpanData) -> ReadableSpan:
        return ReadableSpan(
            name=span.name,
            context=_context(span.trace_id, span.span_id),
            parent=_context(span.trace_id, span.parent_id) if span.parent_id else None,
            resource=_resource(span.service),
            attributes=span.attributes,
            events=[Event(event.name, dict(event.attributes), event.at_ns) for event in span.events],
            links=[trace.Link(_context(link.trace_id, link.span_id)) for link in span.links],
            kind=_KINDS.get(span.kind, trace.SpanKind.INTERNAL),
            status=_UNSET if span.error is None else Status(StatusCode.ERROR, span.error or None),
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=self._scope,
        )


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


def _context(trace_id: str, span_id: str) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=_SAMPLED)


@functools.lru_cache(maxsize=32)
def _resource(service: str) -> Resource:
    return Resource.create({"service.name": service, "service.version": _version()})


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


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("triptych")
    except importlib.metadata.PackageNotFoundError:
        return "0"
