"""One client's connection, with bounds on all it can make the server hold or wait for: uvicorn's protocol, and more.

uvicorn has no limits of its own on headers, on the time that a request or a response takes, on requests sent ahead, or
on connections that are kept. Each refusal is the OpenAI error object, and never in the middle of another answer. Knows
no route and reads no body: how large one may be is `gateway.connection`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import os
import select
import socket
from collections import OrderedDict, deque
from typing import Any

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.errors import ApiError, failure_of
from gateway.settings import Settings
from observability import metrics

MAX_HEADERS = 100
MAX_FRAME = 8  # bytes around each byte of a chunked body: one that comes byte by byte has five
MAX_AHEAD = 8  # requests sent before the one that is being answered is
LINGER_S = 2.0  # to read what a refused client still sends: to close upon it would destroy the answer on its way
LOOK_S = 0.1
UNSENT_BYTES = 64 * 1024  # that the kernel holds of one connection

_GONE = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


class Connections:
    """All connections of one server, of which so many may be open, and the order in which they became idle."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._open: set[Bounded] = set()
        self._idle: OrderedDict[Bounded, None] = OrderedDict()

    def __call__(self, *args: Any, **options: Any) -> Bounded:
        """What uvicorn takes for the protocol's class."""
        return Bounded(self, *args, **options)

    def opened(self, connection: Bounded) -> bool:
        """Whether there is room: the longest idle makes it, if there is one."""
        if len(self._open) >= self.settings.max_connections:
            if not self._idle:
                return False
            oldest = next(iter(self._idle))
            self.closed(oldest)
            oldest.end("idle")
        self._open.add(connection)
        self._idle[connection] = None
        return True

    def busy(self, connection: Bounded) -> None:
        self._idle.pop(connection, None)

    def idle(self, connection: Bounded) -> None:
        if connection in self._open:
            self._idle[connection] = None

    def closed(self, connection: Bounded) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)


class Bounded(HttpToolsProtocol):
    """uvicorn's, between whose callbacks two timers run: one while a request is read, one while the client does not."""

    def __init__(self, connections: Connections, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        settings = connections.settings
        self.timeout_keep_alive = settings.idle_timeout_s
        self._settings = settings
        self._connections = connections
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
        # Requests whose headers are complete and whose answers are not; the first is being answered.
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._in_message = False
        self._in_head = True
        self._upgrading = False
        self._messages = 0
        self._head_bytes = 0  # of a request's headers that came after their first piece
        self._body_bytes = 0  # of the body itself
        self._frame_bytes = 0  # of what frames its chunks, and follows them
        self._refusal: ApiError | None = None  # nothing more is parsed; it is told when all before it is answered
        self._told = False

    # From the transport.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _bound_kernel(transport)
        if self._connections.opened(self):
            self._read_within(self._settings.header_timeout_s)
        else:
            self._refuse(*_FULL)
            self.transport.close()  # and no lingering: that would be a connection too

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.closed(self)
        self._unset_keepalive_if_required()  # uvicorn forgets it where there was an error
        _stop(self._reading)
        _stop(self._writing)
        _stop(self._looking)
        self._reading = self._writing = self._looking = None
        for cycle in self._unanswered:  # uvicorn tells the last one alone
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refusal or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        body, message = self._body_bytes, self._messages
        in_message, in_body = self._in_message, self._in_message and not self._in_head
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            self._refuse(*_why(error))
            return
        # httptools collects a head, and what is around a body's chunks, without a bound.
        if self._in_head and self._in_message:
            if self._messages == message:
                self._head_bytes += len(data)
            else:  # it began here; behind another's end, what is known of it is what counts
                alone = not in_message and self._messages == message + 1
                self._head_bytes = len(data) if alone else self._head_size()
            if self._head_bytes > self._settings.max_header_bytes:
                self._refuse(*_why(_HeadTooLarge()))
                return
        if in_body and not self._in_head and self._messages == message:
            self._frame_bytes += len(data) - (self._body_bytes - body)
            if self._frame_bytes > self._settings.max_header_bytes + MAX_FRAME * self._body_bytes:
                self._refuse(*_why(_HeadTooLarge()))
                return
        if self._reading is None and (self._in_message or not self._unanswered):
            self._read_next_part()
        if self.flow.read_paused and self._looking is None:
            self._looking = self.loop.call_later(LOOK_S, self._look)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_within(self._settings.write_timeout_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unanswered:  # else the end of an answer still has to go, within its time
            _stop(self._writing)
            self._writing = None

    # From the parser.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_message, self._in_head = True, True
        self._messages += 1
        self._head_bytes = self._body_bytes = self._frame_bytes = 0
        if len(self._unanswered) > MAX_AHEAD:
            raise _TooFarAhead

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._upgrading = True
            return
        if self._head_size() > self._settings.max_header_bytes or len(self.headers) > MAX_HEADERS:
            raise _HeadTooLarge
        super().on_headers_complete()
        self._in_head = False
        self._stop_reading()
        self._unanswered.append(self.cycle)
        self._connections.busy(self)

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        super().on_message_complete()
        self._in_message, self._in_head = False, True
        self._stop_reading()

    # From the response.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unanswered.popleft()
        if self.transport.get_write_buffer_size():
            self._write_within(self._settings.write_timeout_s)
        if self.transport.is_closing():
            return
        if not self._unanswered:
            self._connections.idle(self)
        if self._refusal:
            self._tell()
        elif self._in_message and not self._in_head and not self._unanswered:
            # It was answered before it had sent its body, so a client that waits for that may learn of it.
            self._read_within(LINGER_S)

    def shutdown(self) -> None:
        super().shutdown()
        if self._refusal and not self._unanswered:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(*_why(httptools.HttpParserError(msg)))

    # The bounds.

    def end(self, reason: str) -> None:
        """Closes it, with nothing to say."""
        metrics.CONNECTIONS_ENDED.labels(reason).inc()
        self.transport.close()

    def _feed(self, data: bytes) -> None:
        """Parses it. The parser takes the body of a request that asks for an upgrade for another protocol, so such a
        request, which every Java client sends, is fed to a new one without the asking (RFC 9110, 7.8: it may be
        ignored)."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stopped:
                data = self._head_without_upgrade() + data[stopped.args[0] :]
                self._upgrading = False
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b"close" if b"close" in value.lower() else b"keep-alive"
            if name != b"upgrade":
                lines.append(name + b": " + value)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _look(self) -> None:
        """Whether the client has left. While nothing is read (a request is sent ahead) its end is not read either."""
        self._looking = None
        if self.transport.is_closing() or not self.flow.read_paused:
            return
        watch = select.poll()
        watch.register(self.transport.get_extra_info("socket").fileno(), _GONE)
        if watch.poll(0):
            self.transport.abort()
        else:
            self._looking = self.loop.call_later(LOOK_S, self._look)

    def _read_next_part(self) -> None:
        self._read_within(self._settings.header_timeout_s if self._in_head else self._settings.body_timeout_s)

    def _read_within(self, seconds: float) -> None:
        _stop(self._reading)
        self._reading = self.loop.call_later(seconds, self._late)

    def _stop_reading(self) -> None:
        _stop(self._reading)
        self._reading = None

    def _late(self) -> None:
        self._reading = None
        if self.transport.is_closing():
            return
        if not self._in_message:
            if not self._unanswered:
                self.end("idle")
        elif self.flow.read_paused:  # it is not the client that waits
            self._read_next_part()
        elif self._in_head:
            message = f"The request's headers did not come within {self._settings.header_timeout_s} s."
            self._refuse(ApiError(408, message, code="request_timeout"), "slow_headers")
        elif self.cycle.response_complete:
            self.end("slow_body")
        else:
            message = f"The request's body did not come within {self._settings.body_timeout_s} s."
            self._refuse(ApiError(408, message, code="request_timeout"), "slow_body")

    def _write_within(self, seconds: float) -> None:
        _stop(self._writing)
        self._writing = self.loop.call_later(seconds, self._unread)

    def _unread(self) -> None:
        """The client has not read for so long, or not all of an answer's end: what waits for it is dropped."""
        self._writing = None
        if self.transport.get_write_buffer_size() and (self.flow.write_paused or not self._unanswered):
            metrics.CONNECTIONS_ENDED.labels("not_reading").inc()
            self.transport.abort()

    def _refuse(self, refusal: ApiError, reason: str) -> None:
        """Tells it, once the requests before have their answers; nothing that the client sends is parsed any more."""
        metrics.CONNECTIONS_ENDED.labels(reason).inc()
        self._refusal = refusal
        self._stop_reading()
        cycle = self.cycle
        if self._in_message and not self._in_head and not cycle.response_complete:  # it was let in, and is not whole
            if cycle.response_started:
                self.transport.close()
                return
            self._unanswered.pop()
            if self.pipeline and self.pipeline[0][0] is cycle:
                self.pipeline.popleft()
            else:
                cycle.disconnected = True
                cycle.message_event.set()
        self._tell()

    def _tell(self) -> None:
        if self._unanswered or self._told or not self._refusal:
            return
        self._told = True
        self._unset_keepalive_if_required()
        self._connections.idle(self)
        self.transport.write(_response(self._refusal))
        with contextlib.suppress(NotImplementedError, OSError, RuntimeError):
            if self.transport.can_write_eof():
                self.transport.write_eof()
        self._reading = self.loop.call_later(LINGER_S, self.transport.abort)


_FULL = (
    ApiError(503, "The server has no connection left.", code="overloaded", headers={"retry-after": "1"}),
    "connections",
)


class _HeadTooLarge(Exception):
    """More header than is taken."""


class _TooFarAhead(Exception):
    """More requests than are answered."""


def _why(error: Exception) -> tuple[ApiError, str]:
    """What a client is told of the parser's error; httptools wraps what a callback raised."""
    cause = error.__context__ or error
    if isinstance(cause, _HeadTooLarge) or isinstance(error, _HeadTooLarge):
        message = f"The request's headers are too large, or more than {MAX_HEADERS}."
        return ApiError(431, message, code="request_headers_too_large"), "headers_too_large"
    if isinstance(cause, _TooFarAhead):
        message = f"More than {MAX_AHEAD} requests were sent ahead of their answers."
        return ApiError(429, message, code="overloaded", headers={"retry-after": "1"}), "too_far_ahead"
    return ApiError(400, "This is not an HTTP/1.1 request.", code="invalid_request"), "malformed"


def _response(refusal: ApiError) -> bytes:
    """As `gateway.errors` would answer it, for what never became a request."""
    request_id = f"req_{os.urandom(16).hex()}"
    failure = failure_of(refusal, request_id)
    body = orjson.dumps(failure.body())
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-request-id": request_id,
        **failure.headers,
    }
    lines = [f"HTTP/1.1 {failure.status} {http.HTTPStatus(failure.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _bound_kernel(transport: asyncio.Transport) -> None:
    """The kernel would take megabytes for a client that does not read; so it waits with us, where it is seen."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    connection = transport.get_extra_info("socket")
    if option is not None and connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, option, UNSENT_BYTES)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer:
        timer.cancel()
