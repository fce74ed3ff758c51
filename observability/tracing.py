"""Spans, for the gateway and for the stages inside Triton: start, set, end, and a traceparent to hand on.

Off unless an OTLP endpoint is configured: until then OpenTelemetry is not imported and every span is one
shared object that does nothing. Knows nothing of HTTP, Triton or what is traced. Exports that fail never
disturb a request; they are counted (`stats`).
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.trace import Span as OtelSpan

    from observability import otlp

log = logging.getLogger(__name__)

now_ns = time.time_ns
_MESSAGE_LIMIT = 500


class Span:
    """A span that does nothing: what `start` returns when tracing is off or the request is not sampled."""

    __slots__ = ()

    @property
    def traceparent(self) -> str | None:
        """What to hand to the next process; None when there is nothing to continue."""
        return None

    @property
    def trace_id(self) -> str | None:
        return None

    @property
    def span_id(self) -> str | None:
        return None

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Adds attributes; those that are None are left out."""

    def error(self, type: str, message: str = "") -> None:
        """Marks it failed: `type` is a name of few values (`error.type`), `message` holds no user content."""

    def end(self, end_ns: int | None = None) -> None:
        """Ends it, now or at `end_ns`; only the first call counts."""

    def __enter__(self) -> Span:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            code = getattr(error, "code", None)  # an error of ours has a name of few values
            self.error(code if isinstance(code, str) else kind.__name__, str(error))
        self.end()


NO_SPAN = Span()


class _LiveSpan(Span):
    __slots__ = ("_ended", "_span", "_tracer", "context")

    def __init__(self, tracer: otlp.Tracer, span: OtelSpan) -> None:
        self._tracer = tracer
        self._span = span
        self._ended = False
        self.context = span.get_span_context()

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.context.trace_flags:02x}"

    @property
    def trace_id(self) -> str:
        return f"{self.context.trace_id:032x}"

    @property
    def span_id(self) -> str:
        return f"{self.context.span_id:016x}"

    def set(self, attributes: Mapping[str, Any]) -> None:
        if not self._ended:
            self._span.set_attributes(_given(attributes))

    def error(self, type: str, message: str = "") -> None:
        if not self._ended:
            self._tracer.fail(self._span, type, message[:_MESSAGE_LIMIT])

    def end(self, end_ns: int | None = None) -> None:
        if not self._ended:
            self._ended = True
            self._tracer.end(self._span, end_ns)


_tracer: otlp.Tracer | None = None


def configure(service_name: str) -> bool:
    """Reads the standard OTEL_* variables; True if spans will be exported. A new call replaces the last."""
    global _tracer
    shutdown()
    environ = os.environ
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    if not endpoint or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none":
        return False
    try:
        if exporter != "otlp":
            raise RuntimeError(f"OTEL_TRACES_EXPORTER={exporter} is not supported: use otlp or none.")
        from observability import otlp

        _tracer = otlp.Tracer(service_name)
    except Exception as error:  # tracing never keeps the product from starting
        log.warning("tracing is off: %s", error)
        return False
    return True


def start(
    name: str,
    *,
    kind: str = "internal",
    parent: Span | str | None = None,
    attributes: Mapping[str, Any] | None = None,
    start_ns: int | None = None,
) -> Span:
    """A span of kind internal, server or client, under `parent`: a Span or a W3C traceparent.

    Only a server span may begin a trace: there a missing or malformed parent starts a root. Elsewhere a
    missing, malformed or unsampled parent gives the span that does nothing.
    """
    tracer = _tracer
    if tracer is None:
        return NO_SPAN
    above = None
    if isinstance(parent, _LiveSpan):
        above = parent.context
    elif isinstance(parent, str):
        above = tracer.remote_parent(parent)
    if kind != "server" and (above is None or not above.trace_flags.sampled):
        return NO_SPAN
    span = tracer.start(name, kind, above, _given(attributes or {}), start_ns)
    return NO_SPAN if span is None else _LiveSpan(tracer, span)


def record(
    name: str,
    parent: Span | str | None,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, Any] | None = None,
    *,
    kind: str = "internal",
) -> Span:
    """A span told after the fact, already ended; others may still be recorded under it."""
    span = start(name, kind=kind, parent=parent, attributes=attributes, start_ns=start_ns)
    span.end(max(start_ns, end_ns))
    return span


def stats() -> dict[str, int]:
    """Spans ended, exported and failed to export, since `configure`; the rest wait, or were dropped."""
    return _tracer.stats() if _tracer else {"ended": 0, "exported": 0, "failed": 0}


def flush(timeout_ms: int = 2000) -> bool:
    """Exports what is waiting; False if that took longer."""
    return _tracer is None or _bounded(_tracer.flush, timeout_ms)


def shutdown(timeout_ms: int = 2000) -> None:
    """Exports what is waiting, no longer than this, and turns tracing off."""
    global _tracer
    tracer, _tracer = _tracer, None
    if tracer:
        _bounded(tracer.shutdown, timeout_ms)


def _given(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if value is not None}


def _bounded(action: Callable[[], Any], timeout_ms: int) -> bool:
    # The SDK ignores the timeouts it is given, so they are kept here.
    thread = threading.Thread(target=action, name="tracing-flush", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is past starting threads, so the exporter's own is gone too
        return False
    thread.join(timeout_ms / 1000)
    return not thread.is_alive()


atexit.register(shutdown)
