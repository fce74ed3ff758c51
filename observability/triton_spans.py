"""Triton's own spans, as its exporter posts them: OTLP/HTTP as JSON, which is all it speaks, to a loopback port.

Triton traces a request only if its gRPC or HTTP headers have a `traceparent`, so whoever sends none pays nothing. Its
spans are renamed, because its models have the stages' names: `triton compute`. Knows no request, and decides nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from observability.keeping import TRITON
from observability.spans import Event, SpanData, read_document

log = logging.getLogger(__name__)

_PATH = "/v1/traces"
_MOST_BYTES = 8 * 1024 * 1024
_SETTLE_S = 0.1  # for the stages' spans of the same request to come first: by them is known whether it is sampled
_PATIENCE_S = 30
_CLOSES_WITHIN_S = 0.05  # the standard library looks every half a second, and an end waits for that


class TritonSpans:
    """Receives, from construction until closed; `take` is called from threads, a span at a time."""

    def __init__(self, service: str, take: Callable[[SpanData], None]) -> None:
        spans = self
        self._service = service
        self._take = take

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = _PATIENCE_S

            def do_POST(self) -> None:
                size = self.headers.get("Content-Length", "")
                good = self.path == _PATH and size.isdecimal() and int(size) <= _MOST_BYTES
                body = self.rfile.read(int(size)) if good else b""
                self.send_response(200 if good else 400)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", "2")
                if not good:
                    self.send_header("Connection", "close")  # and its body is not read
                self.end_headers()
                self.wfile.write(b"{}")
                self.wfile.flush()
                if good:
                    time.sleep(_SETTLE_S)
                    spans._receive(body)

            def log_message(self, format: str, *arguments: object) -> None:
                log.debug(format, *arguments)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}{_PATH}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_CLOSES_WITHIN_S,), name="triton-spans", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=2)

    def _receive(self, body: bytes) -> None:
        try:
            for span in read_document(body):
                self._take(replace(span, name=TRITON + span.name, service=self._service, events=list(_said(span))))
        except Exception:  # whatever was posted, the next is looked at too
            log.exception("spans of Triton could not be kept")


def _said(span: SpanData) -> Iterator[Event]:
    """The events that say something: not the span's own bounds, nor what a stream waited for before the request."""
    for event in span.events:
        if span.start_ns < event.at_ns < span.end_ns:
            yield event


def arguments(url: str) -> list[str]:
    """How Triton is started to post them there: no request is sampled (rate 0), but by its own `traceparent`.

    A header of that name is the request parameter too, by which the stages' spans are in the same trace.
    """
    traced = [
        "mode=opentelemetry",
        "level=TIMESTAMPS",
        "rate=0",
        f"opentelemetry,url={url}",
        "opentelemetry,bsp_schedule_delay=200",
    ]
    forwarded = [f"--{protocol}-header-forward-pattern=traceparent" for protocol in ("grpc", "http")]
    return [*(f"--trace-config={setting}" for setting in traced), *forwarded]
