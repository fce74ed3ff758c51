"""Server-sent events: a stream's deltas as bytes, and the writer that sends them over ASGI.

The encoding is pure. The writer knows neither spans nor admission, nor how a client's leaving is noticed: it
is cancelled then. One delta is one `send`, whatever the number of its events: the `send` is what costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import Send

from gateway import objects
from gateway.backend import Delta
from gateway.choices import Arrival, Choice, Merged, Totals
from gateway.errors import Failure
from gateway.objects import Head, Held
from gateway.protocol import Operation

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]
BLOCKED_S = 0.001  # a send that takes longer waited for the client; a shorter one only wrote
_LINE_BREAKS = [(char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\u0085\u2028\u2029"]
_MARK = "\0"  # a text that no name, id or number of a chunk contains
_MARKED = orjson.dumps(_MARK)
_BETWEEN = "\x7f"  # texts: of what JSON leaves as it is, few contain it
_MANY = 5  # from so many on it is quicker to make their JSON at once: 64 in 6 µs, where one by one is 45


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
    """The events of one stream. What the chunks of text of a choice have in common is made once."""

    def __init__(
        self,
        operation: Operation,
        head: Head,
        choices: Sequence[Choice],
        *,
        include_usage: bool,
        timing: Callable[[Totals], Held] | None = None,
    ) -> None:
        self._operation = operation
        self._head = head
        self._choices = choices
        self._include_usage = include_usage
        self._timing = timing
        self._around = [self._chunk(choice.index, operation.piece(_MARK)).split(_MARKED) for choice in choices]
        self._between = [b'"' + suffix + prefix + b'"' for prefix, suffix in self._around]

    def opening(self) -> bytes:
        """OpenAI: a chat's first chunk says who speaks; a completion has none such."""
        held = self._operation.opening
        return b"" if held is None else b"".join([self._chunk(choice.index, held) for choice in self._choices])

    def delta(self, index: int, delta: Delta) -> bytes:
        """One event a text, and the one with the finish_reason if there is one."""
        pieces = self._choices[index].push(delta)
        if len(pieces) == 1 and not delta.finish_reason and type(pieces[0]) is str and pieces[0]:  # the rule
            prefix, suffix = self._around[index]
            return prefix + quote(pieces[0]) + suffix
        data = self._at_once(index, delta.texts) if pieces is delta.texts and len(pieces) >= _MANY else b""
        data = data or b"".join([self._piece(index, piece) for piece in pieces])
        if delta.finish_reason:
            reason = self._choices[index].finish_reason(delta.finish_reason)
            data += self._chunk(index, self._operation.closing, reason)
        return data

    def closing(self, totals: Totals) -> bytes:
        """The usage, if it was asked for, with what each stage took, if that was; and [DONE]."""
        if not self._include_usage:
            return DONE
        used = objects.usage(totals.prompt_tokens, totals.completion_tokens, totals.cached_tokens)
        chunk = objects.usage_chunk(self._head, used)
        if self._timing:
            chunk["timing"] = self._timing(totals)
        return event(chunk) + DONE

    @staticmethod
    def error(failure: Failure) -> bytes:
        """The last event of a stream that failed: no [DONE] follows. The official client raises APIError."""
        return event(failure.body())

    def _at_once(self, index: int, texts: Sequence[str]) -> bytes:
        """An event for each; nothing if one is empty, or contains what shall stand between them."""
        text = _BETWEEN.join(texts)
        if text.count(_BETWEEN) != len(texts) - 1 or not all(texts):
            return b""
        prefix, suffix = self._around[index]
        return prefix + quote(text).replace(_BETWEEN.encode(), self._between[index]) + suffix

    def _piece(self, index: int, piece: str | Held) -> bytes:
        if not isinstance(piece, str):
            return self._chunk(index, piece)
        if not piece:
            return b""
        prefix, suffix = self._around[index]
        return prefix + quote(piece) + suffix

    def _chunk(self, index: int, held: Held, finish_reason: str | None = None) -> bytes:
        usage_null = self._include_usage
        return event(objects.chunk(self._head, index, held, finish_reason=finish_reason, usage_null=usage_null))


@dataclass
class Written:
    """What a stream's writing came to."""

    totals: Totals
    events: int = 0
    bytes: int = 0
    blocked_s: float = 0.0
    first_text_at: float = 0.0  # time.perf_counter, 0 before
    failure: Failure | None = None


async def write_stream(
    send: Send,
    deltas: Merged,
    first: Sequence[Arrival],
    events: Events,
    written: Written,
    fail: Callable[[Exception], Failure],
) -> None:
    """Sends the headers, the first deltas' events, then each as it comes.

    A failure of a choice is the stream's last event. `written` says how far it came, whenever it ends.
    """
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    try:
        end = await _write_deltas(send, deltas, first, events, written)
    except Exception as error:
        written.failure = fail(error)
        end = Events.error(written.failure)
    await send({"type": "http.response.body", "body": end, "more_body": False})
    written.bytes += len(end)


async def _write_deltas(
    send: Send, deltas: Merged, arrivals: Sequence[Arrival], events: Events, written: Written
) -> bytes:
    """Sends all but the last deltas' events, and returns those: the body's end is then in the same `send`."""
    clock = time.perf_counter
    data = events.opening()
    while True:
        for index, delta in arrivals:
            data += events.delta(index, delta)
            if delta.texts:
                written.events += len(delta.texts)
                if not written.first_text_at:
                    written.first_text_at = clock()
            if delta.finish_reason:
                written.totals.add(index, delta)
        if deltas.over:
            return data + events.closing(written.totals)
        if data:
            written.bytes += len(data)
            before = clock()
            await send({"type": "http.response.body", "body": data, "more_body": True})
            waited = clock() - before
            if waited > BLOCKED_S:
                written.blocked_s += waited
        data = b""
        arrivals = await deltas.next()
