"""A collector for tests: takes OTLP/HTTP on a loopback port and judges whether a trace is whole.

    with Receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        ...
        tree = receiver.tree(trace_id, expect={"generate"})

`tree` waits for the spans named and raises BrokenTrace for what a user would see as a broken trace in Jaeger.
"""

from __future__ import annotations

import gzip
import json
import ssl
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

CLOCK_TOLERANCE_NS = 5_000_000
_KINDS = ["unspecified", "internal", "server", "client", "producer", "consumer"]


class BrokenTrace(AssertionError):
    """Says what is wrong with the trace, and shows it."""


@dataclass
class ReceivedSpan:
    trace_id: str
    span_id: str
    parent_id: str  # "" for a root
    name: str
    kind: str
    start_ns: int
    end_ns: int
    service: str
    attributes: dict[str, Any] = field(default_factory=dict)
    error: str | None = None  # the status message when the status is an error
    children: list[ReceivedSpan] = field(default_factory=list)

    def walk(self) -> Iterator[ReceivedSpan]:
        yield self
        for child in self.children:
            yield from child.walk()

    def find(self, name: str) -> ReceivedSpan:
        """The only span of this name, here or below."""
        found = [span for span in self.walk() if span.name == name]
        if len(found) != 1:
            raise BrokenTrace(f"{len(found)} spans named {name!r} in\n{self}")
        return found[0]

    def names(self) -> list[str]:
        return [span.name for span in self.walk()]

    def __str__(self) -> str:
        return "\n".join(self._lines(self.start_ns, 0))

    def _lines(self, origin: int, depth: int) -> Iterator[str]:
        start, length = (self.start_ns - origin) / 1e6, (self.end_ns - self.start_ns) / 1e6
        failed = "" if self.error is None else f"  ERROR {self.error}"
        indent = "  " * depth
        yield f"{indent}{self.name} [{self.service}, {self.kind}] +{start:.2f} ms, {length:.2f} ms{failed}"
        for child in self.children:
            yield from child._lines(origin, depth + 1)


class Receiver:
    """The collector; `endpoint` is what OTEL_EXPORTER_OTLP_ENDPOINT takes."""

    def __init__(self, status: int = 200, *, tls: ssl.SSLContext | None = None) -> None:
        self.status = status  # what every export is answered with; tests set it to fail exports
        self.busy = 0  # so many are first answered that they should come again at once
        self.headers: list[dict[str, str]] = []
        self.requests = 0
        self.unreadable: list[str] = []
        self._spans: list[ReceivedSpan] = []
        self._changed = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                kind = self.headers.get("Content-Type", "")
                compressed = self.headers.get("Content-Encoding") == "gzip"
                receiver.headers.append({name.lower(): value for name, value in self.headers.items()})
                if busy := receiver.busy > 0:
                    receiver.busy -= 1
                    status = 503
                else:
                    status = receiver._receive(self.path, kind, gzip.decompress(body) if compressed else body)
                self.send_response(status)
                if busy:
                    self.send_header("Retry-After", "0")
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", "2" if "json" in kind else "0")
                self.end_headers()
                self.wfile.write(b"{}" if "json" in kind else b"")

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.endpoint = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def spans(self) -> list[ReceivedSpan]:
        """Everything received so far."""
        with self._changed:
            return list(self._spans)

    def spans_of(self, trace_id: str, timeout: float = 5, count: int = 1) -> list[ReceivedSpan]:
        """The trace's spans, once there are `count` of them."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                found = [span for span in self._spans if span.trace_id == trace_id]
                left = deadline - time.monotonic()
                if len(found) >= count:
                    return found
                if left <= 0:
                    names = [span.name for span in found]
                    raise BrokenTrace(f"{len(found)} of {count} spans of trace {trace_id}: {names}")
                self._changed.wait(left)

    def tree(
        self,
        trace_id: str,
        *,
        expect: Collection[str] = (),
        remote_parent: str | None = None,
        timeout: float = 5,
        tolerance_ns: int = CLOCK_TOLERANCE_NS,
    ) -> ReceivedSpan:
        """The root with its children, once the names in `expect` are there and the trace is whole.

        `remote_parent` is the span id of a caller outside, whose child is then the root.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                spans = [span for span in self.spans() if span.trace_id == trace_id]
                missing = set(expect) - {span.name for span in spans}
                if missing:
                    shown = sorted(span.name for span in spans)
                    raise BrokenTrace(f"trace {trace_id} lacks {sorted(missing)}; it has {shown}")
                return build_tree(spans, remote_parent=remote_parent, tolerance_ns=tolerance_ns)
            except BrokenTrace:
                if time.monotonic() > deadline:
                    raise
            with self._changed:
                self._changed.wait(0.1)

    def _receive(self, path: str, content_type: str, body: bytes) -> int:
        with self._changed:
            self.requests += 1
            if self.status != 200:
                return self.status
            try:
                if path != "/v1/traces":
                    raise ValueError(f"POST {path}")
                self._spans += _from_json(body) if "json" in content_type else _from_protobuf(body)
            except Exception as error:
                self.unreadable.append(repr(error))
                return 400
            self._changed.notify_all()
        return 200


def build_tree(
    spans: list[ReceivedSpan], *, remote_parent: str | None = None, tolerance_ns: int = CLOCK_TOLERANCE_NS
) -> ReceivedSpan:
    """The trace's root, children in order of time; BrokenTrace unless the spans are one whole trace."""
    by_id: dict[str, ReceivedSpan] = {}
    for span in spans:
        if span.span_id in by_id:
            raise BrokenTrace(f"two spans have the id {span.span_id}: {by_id[span.span_id].name}, {span.name}")
        if span.end_ns < span.start_ns:
            raise BrokenTrace(f"{span.name} ends before it starts")
        by_id[span.span_id] = span
        span.children = []
    roots = []
    for span in spans:
        if not span.parent_id or span.parent_id == remote_parent:
            roots.append(span)
        elif span.parent_id in by_id:
            by_id[span.parent_id].children.append(span)
        else:
            raise BrokenTrace(f"{span.name} is an orphan: there is no span {span.parent_id}")
    if len(roots) != 1:
        raise BrokenTrace(f"{len(roots)} roots: {sorted(span.name for span in roots)}")
    root = roots[0]
    if len(list(root.walk())) != len(spans):
        raise BrokenTrace("some spans are each other's ancestors")
    for span in spans:
        span.children.sort(key=lambda child: child.start_ns)
        for child in span.children:
            early, late = span.start_ns - child.start_ns, child.end_ns - span.end_ns
            if max(early, late) > tolerance_ns:
                raise BrokenTrace(f"{child.name} is outside {span.name} by {max(early, late) / 1e6:.2f} ms in\n{root}")
    return root


def _from_protobuf(body: bytes) -> list[ReceivedSpan]:
    spans = []
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        service = _protobuf_attributes(resource.resource.attributes).get("service.name", "")
        for scope in resource.scope_spans:
            for span in scope.spans:
                spans.append(
                    ReceivedSpan(
                        trace_id=span.trace_id.hex(),
                        span_id=span.span_id.hex(),
                        parent_id=span.parent_span_id.hex(),
                        name=span.name,
                        kind=_KINDS[span.kind],
                        start_ns=span.start_time_unix_nano,
                        end_ns=span.end_time_unix_nano,
                        service=str(service),
                        attributes=_protobuf_attributes(span.attributes),
                        error=span.status.message if span.status.code == 2 else None,
                    )
                )
    return spans


def _protobuf_attributes(attributes: Any) -> dict[str, Any]:
    return {attribute.key: _protobuf_value(attribute.value) for attribute in attributes}


def _protobuf_value(value: Any) -> Any:
    which = value.WhichOneof("value")
    if which == "array_value":
        return [_protobuf_value(item) for item in value.array_value.values]
    return getattr(value, which) if which else None


def _from_json(body: bytes) -> list[ReceivedSpan]:
    """OTLP's JSON: ids in hex, 64-bit integers as strings. It is what Triton's own exporter sends."""
    spans = []
    for resource in json.loads(body)["resourceSpans"]:
        service = _json_attributes(resource.get("resource", {}).get("attributes", [])).get("service.name", "")
        for scope in resource.get("scopeSpans", []):
            for span in scope.get("spans", []):
                status = span.get("status", {})
                spans.append(
                    ReceivedSpan(
                        trace_id=span["traceId"].lower(),
                        span_id=span["spanId"].lower(),
                        parent_id=span.get("parentSpanId", "").lower(),
                        name=span["name"],
                        kind=_KINDS[span.get("kind", 0)],
                        start_ns=int(span["startTimeUnixNano"]),
                        end_ns=int(span["endTimeUnixNano"]),
                        service=str(service),
                        attributes=_json_attributes(span.get("attributes", [])),
                        error=status.get("message", "") if status.get("code") == 2 else None,
                    )
                )
    return spans


def _json_attributes(attributes: list[dict[str, Any]]) -> dict[str, Any]:
    return {attribute["key"]: _json_value(attribute["value"]) for attribute in attributes}


def _json_value(value: dict[str, Any]) -> Any:
    for kind, held in value.items():
        if kind == "arrayValue":
            return [_json_value(item) for item in held.get("values", [])]
        return int(held) if kind == "intValue" else held
    return None
