"""Server-sent events: a stream's deltas as bytes, and the writer that sends them over ASGI.

The encoding is pure. The writer knows neither spans nor admission, nor how a client's leaving is noticed: it
is cancelled then. One delta is one `send`, whatever the number of its events: the `send` is what costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import Send

from gateway import protocol
from gateway.backend import Delta, Stream
from gateway.errors import Failure
from gateway.protocol import Head, Operation

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]
BLOCKED_S = 0.001  # a send that takes longer waited for the client; a shorter one only wrote
_LINE_BREAKS = [(char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\u0085\u2028\u2029"]
_MARK = "\0"  # a text that no name, id or number of a chunk contains


def event(value: Any) -> bytes:
    """WHATWG HTML, 9.2.6: an event is its `data:` line and a blank line. JSON holds no raw line break."""
    return b"data: " + quote(value) + b"\n\n"


def quote(value: Any) -> bytes:
    """JSON, in which whatever some clients take for a line break (Python's str.splitlines does: NEL, U+2028,
    U+2029) is escaped."""
    data: bytes = orjson.dumps(value)
    if not data.isascii():
        for raw, escaped in _LINE_BREAKS:
            data = data.replace(raw, escaped)
    return data


class Events:
    """The events of one stream. What the chunks of text have in common is made once."""

    def __init__(self, operation: Operation, head: Head, include_usage: bool) -> None:
        self._operation = operation
        self._head = head
        self._include_usage = include_usage
        whole = event(protocol.chunk(operation, head, operation.piece(_MARK), usage_null=include_usage))
        self._prefix, self._suffix = whole.split(orjson.dumps(_MARK))

    def opening(self) -> bytes:
        """OpenAI: a chat's first chunk says who speaks; a completion has none such."""
        held = self._operation.opening
        if held is None:
            return b""
        return event(protocol.chunk(self._operation, self._head, held, usage_null=self._include_usage))

    def texts(self, texts: list[str]) -> bytes:
        """One event a text."""
        prefix, suffix = self._prefix, self._suffix
        if len(texts) == 1 and texts[0]:
            return prefix + quote(texts[0]) + suffix
        return b"".join([prefix + quote(text) + suffix for text in texts if text])

    def closing(self, last: Delta) -> bytes:
        """The chunk with the finish_reason, the usage if it was asked for, and [DONE]."""
        operation, head = self._operation, self._head
        data = event(
            protocol.chunk(
                operation,
                head,
                operation.closing,
                finish_reason=last.finish_reason,
                usage_null=self._include_usage,
            )
        )
        if self._include_usage:
            used = protocol.usage(last.prompt_tokens, last.completion_tokens)
            data += event(protocol.usage_chunk(operation, head, used))
        return data + DONE

    @staticmethod
    def error(failure: Failure) -> bytes:
        """The last event of a stream that failed: no [DONE] follows. The official client raises APIError."""
        return event(failure.body())


@dataclass
class Written:
    """What a stream's writing came to."""

    events: int = 0
    bytes: int = 0
    blocked_s: float = 0.0
    first_text_at: float = 0.0  # time.perf_counter, 0 before
    last: Delta | None = None
    failure: Failure | None = None


async def write_stream(
    send: Send,
    stream: Stream,
    first: Delta,
    events: Events,
    written: Written,
    fail: Callable[[Exception], Failure],
) -> None:
    """Sends the headers, the first delta's events, then each delta's as it comes.

    A failure of the stream is its last event. `written` says how far it came, whenever it ends.
    """
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    try:
        end = await _write_deltas(send, stream, first, events, written)
    except Exception as error:
        written.failure = fail(error)
        end = Events.error(written.failure)
    await send({"type": "http.response.body", "body": end, "more_body": False})
    written.bytes += len(end)


async def _write_deltas(send: Send, stream: Stream, delta: Delta, events: Events, written: Written) -> bytes:
    """Sends all but the last delta's events, and returns those: the body's end is then in the same `send`."""
    clock = time.perf_counter
    data = events.opening()
    while True:
        texts = delta.texts
        data += events.texts(texts)
        written.events += len(texts)
        if texts and not written.first_text_at:
            written.first_text_at = clock()
        if delta.finish_reason:
            written.last = delta
            return data + events.closing(delta)
        if data:
            written.bytes += len(data)
            before = clock()
            await send({"type": "http.response.body", "body": data, "more_body": True})
            waited = clock() - before
            if waited > BLOCKED_S:
                written.blocked_s += waited
        data = b""
        delta = await stream.next()
