"""Spans, for the gateway and for the stages inside Triton: start, set, end, and a traceparent to hand on.

A span that ends goes two ways: to whoever collects all of them in this process (the gateway's ring, or the socket
that leads there), and, where its trace is sampled and an OTLP endpoint is configured, to the exporter. With neither,
every span is one shared object that does nothing; without an endpoint, OpenTelemetry is not imported. Knows nothing
of HTTP, Triton or what is traced. What fails here never disturbs a request; it is counted (`stats`).
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from observability.encoded import encode
from observability.sampling import Sampler, sampler
from observability.spans import Event, Link, SpanData

if TYPE_CHECKING:
    from observability import otlp

log = logging.getLogger(__name__)

now_ns = time.time_ns
Collect = Callable[[str, str, bool, bytes], object]  # trace id, service, sampled, encoded
SOCKET = "TRIPTYCH_TRACE_SOCKET"  # where a gateway collects what the stages below it record

_MESSAGE_LIMIT = 500
_LINKS = 8
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Span:
    """A span that does nothing: what `start` returns when tracing is off or the request is not recorded."""

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

    @property
    def sampled(self) -> bool:
        """Whether it will be exported, however it ends."""
        return False

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Adds attributes; those that are None are left out."""

    def event(self, name: str, attributes: Mapping[str, Any] | None = None, at_ns: int | None = None) -> None:
        """Something that happened, now or at `at_ns`."""

    def link(self, traceparent: str) -> None:
        """Another trace that has to do with this one: of those told, the first eight are kept."""

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
    __slots__ = ("_ended", "_recorder", "data")

    def __init__(self, recorder: _Recorder, data: SpanData) -> None:
        self._recorder = recorder
        self._ended = False
        self.data = data

    @property
    def traceparent(self) -> str:
        return f"00-{self.data.trace_id}-{self.data.span_id}-{'01' if self.data.sampled else '00'}"

    @property
    def trace_id(self) -> str:
        return self.data.trace_id

    @property
    def span_id(self) -> str:
        return self.data.span_id

    @property
    def sampled(self) -> bool:
        return self.data.sampled

    def set(self, attributes: Mapping[str, Any]) -> None:
        if not self._ended:
            self.data.attributes.update(_given(attributes))

    def event(self, name: str, attributes: Mapping[str, Any] | None = None, at_ns: int | None = None) -> None:
        if not self._ended:
            self.data.events.append(Event(name, at_ns or now_ns(), _given(attributes or {})))

    def link(self, traceparent: str) -> None:
        other = _parse(traceparent)
        if other and not self._ended and len(self.data.links) < _LINKS:
            self.data.links.append(Link(other[0], other[1]))

    def error(self, type: str, message: str = "") -> None:
        if not self._ended:
            self.data.attributes["error.type"] = type
            self.data.error = message[:_MESSAGE_LIMIT]

    def end(self, end_ns: int | None = None) -> None:
        if not self._ended:
            self._ended = True
            self.data.end_ns = max(self.data.start_ns, now_ns() if end_ns is None else end_ns)
            self._recorder.ended(self.data)


class _Recorder:
    """Where the spans of this process go."""

    def __init__(self, service: str, sampler: Sampler, exporter: otlp.Exporter | None, collect: Collect | None) -> None:
        self.service = service
        self.sampler = sampler
        self.exporter = exporter
        self.collect = collect
        self.close: Callable[[float], object] | None = None

    def ended(self, span: SpanData) -> None:
        encoded = encode(span)
        if self.collect is not None:
            self.collect(span.trace_id, span.service, span.sampled, encoded)
        if span.sampled and self.exporter:
            self.exporter.export(span.service, encoded)


_recorder: _Recorder | None = None


def configure(service_name: str, collect: Collect | None = None) -> bool:
    """Reads the standard OTEL_* variables; True if spans will be exported. A new call replaces the last.

    `collect` gets every span, sampled or not, from the thread that ends it. Without it, where a gateway has said
    by TRIPTYCH_TRACE_SOCKET that it collects them, they are sent there.
    """
    global _recorder
    shutdown()
    environ = os.environ
    if _disabled(environ):
        return False
    service = named(service_name)
    close: Callable[[float], object] | None = None
    if collect is None and (path := environ.get(SOCKET)):
        from observability import handover

        sender = handover.Sender(path)
        collect, close = sender.send, sender.close
    try:
        sampled, exporter = sampler(environ), _exporter(environ)
    except Exception as error:  # tracing never keeps the product from starting
        log.warning("%s: %s", "nothing is exported" if collect else "tracing is off", error)
        sampled, exporter = (lambda trace_id, parent: False), None
    if exporter or collect is not None:
        _recorder = _Recorder(service, sampled if exporter else _only_the_callers(sampled), exporter, collect)
        _recorder.close = close
    return exporter is not None


def start(
    name: str,
    *,
    kind: str = "internal",
    parent: Span | str | None = None,
    attributes: Mapping[str, Any] | None = None,
    start_ns: int | None = None,
) -> Span:
    """A span of kind internal, server or client, under `parent`: a Span or a W3C traceparent.

    Only a server span may begin a trace: there a missing or malformed parent starts a root. Elsewhere a missing or
    malformed parent gives the span that does nothing, as does one that is not sampled where nobody collects those.
    """
    recorder = _recorder
    if recorder is None:
        return NO_SPAN
    if isinstance(parent, _LiveSpan):
        trace_id, parent_id, sampled = parent.data.trace_id, parent.data.span_id, parent.data.sampled
    elif isinstance(parent, str) and (above := _parse(parent)):
        trace_id, parent_id, sampled = above
        sampled = recorder.sampler(trace_id, sampled)
    elif kind == "server":
        trace_id, parent_id = os.urandom(16).hex(), ""
        sampled = recorder.sampler(trace_id, None)
    else:
        return NO_SPAN
    if not sampled and recorder.collect is None:
        return NO_SPAN
    began = now_ns() if start_ns is None else start_ns
    span_id = os.urandom(8).hex()
    given = _given(attributes) if attributes else {}
    data = SpanData(trace_id, span_id, parent_id, name, kind, began, began, recorder.service, sampled, given)
    return _LiveSpan(recorder, data)


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
    span.end(end_ns)
    return span


def export(service: str, encoded: bytes) -> None:
    """Exports a span of a trace that was not sampled, after all; nothing where nothing is exported."""
    if _recorder and _recorder.exporter:
        _recorder.exporter.export(service, encoded)


def stats() -> dict[str, int]:
    """Of the spans to export, since `configure`: ended, exported, failed; the rest wait, or were dropped."""
    exporter = _recorder.exporter if _recorder else None
    return exporter.stats() if exporter else {"ended": 0, "exported": 0, "failed": 0}


def flush(timeout_ms: int = 2000) -> bool:
    """Exports what is waiting; False if that took longer."""
    exporter = _recorder.exporter if _recorder else None
    return exporter is None or exporter.flush(timeout_ms / 1000)


def shutdown(timeout_ms: int = 2000) -> None:
    """Exports what is waiting, no longer than this, and turns tracing off."""
    global _recorder
    recorder, _recorder = _recorder, None
    if recorder and recorder.close:
        recorder.close(timeout_ms / 1000)
    if recorder and recorder.exporter:
        recorder.exporter.close(timeout_ms / 1000)


def modules(environ: Mapping[str, str]) -> tuple[str, ...]:
    """What `configure` will import, for whoever imports it before: 50 ms of each stage's start."""
    return () if _disabled(environ) or not _exported_by(environ) else ("observability.otlp",)


def _disabled(environ: Mapping[str, str]) -> bool:
    return environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def _exported_by(environ: Mapping[str, str]) -> str:
    """The exporter's name; "" if nothing is exported."""
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    name = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    return name if endpoint and name != "none" else ""


def _exporter(environ: Mapping[str, str]) -> otlp.Exporter | None:
    name = _exported_by(environ)
    if not name:
        return None
    if name != "otlp":
        raise RuntimeError(f"OTEL_TRACES_EXPORTER={name} is not supported: use otlp or none.")
    from observability import otlp

    return otlp.Exporter()


def _only_the_callers(sampled: Sampler) -> Sampler:
    """Where nothing is exported nothing is sampled; a caller's flag is handed on all the same."""
    return lambda trace_id, parent: bool(parent) and sampled(trace_id, parent)


@functools.lru_cache(maxsize=256)  # a stage's spans have one parent, and those of its batch are linked to
def _parse(traceparent: str) -> tuple[str, str, bool] | None:
    """Trace id, span id and the sampled flag of a W3C traceparent; None if it is malformed."""
    match = _TRACEPARENT.fullmatch(traceparent.strip())
    if not match or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    if not (match[2].strip("0") and match[3].strip("0")):
        return None
    return match[2], match[3], bool(int(match[4], 16) & 1)


def named(service_name: str) -> str:
    """The user's own name (OTEL_SERVICE_NAME) replaces "triptych", and a stage keeps its suffix."""
    own = os.environ.get("OTEL_SERVICE_NAME", "").strip()
    for pair in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        key, _, value = pair.partition("=")
        if key.strip() == "service.name":
            own = own or urllib.parse.unquote(value.strip())
    if not own:
        return service_name
    return own + service_name.removeprefix("triptych").removeprefix("-gateway")


def _given(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if value is not None}


atexit.register(shutdown)
