"""Where a request's events go: a gateway's lane, or the response stream of one direct request.

Knows no Triton: a `Reply` sends. The two kinds differ only in when they send and in what shape (DESIGN §3).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Protocol

from pipelines import contracts
from pipelines.chat import COALESCE_S, HEARTBEAT_S, Event
from pipelines.contracts import Tensor, Values
from pipelines.errors import StageError
from pipelines.logprobs import Entry
from pipelines.wire import pack_entries, pack_events


class Reply(Protocol):
    """The responses of one decoupled request. Sending to a client that has gone is no error."""

    def send(self, values: Values, *, final: bool = False) -> None: ...

    def fail(self, error: StageError) -> None: ...

    def end(self) -> None: ...

    def gone(self) -> bool: ...


class Lane:
    """One gateway's lane: the events of all its requests, one message a turn."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._sent = 0.0

    def push(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)

    def flush(self, counters: Mapping[str, int], *, now: float) -> bool:
        with self._lock:
            if self._events or now - self._sent >= HEARTBEAT_S / 2:
                events, self._events, self._sent = self._events, [], now
                self._reply.send({contracts.EVENTS: pack_events(events, counters)})
        return False

    def move(self, reply: Reply) -> None:
        """Go on with the next request's responses: a response stream that never ends grows the server."""
        with self._lock:
            old, self._reply = self._reply, reply
            old.end()

    def end(self) -> None:
        with self._lock:
            self._reply.end()

    def gone(self) -> bool:
        return self._reply.gone()


class Stream:
    """One direct request: the first token at once, then at most one response every COALESCE_S."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._lock = threading.Lock()
        self._text = ""
        self._logprobs: list[list[Entry]] = []
        self._sent = 0.0

    def push(self, event: Event) -> None:
        with self._lock:
            self._text += "".join(event.texts)
            self._logprobs += event.logprobs
            if event.error:
                self._reply.fail(event.error)
            elif event.finish_reason:
                self._send(event.finish_reason)

    def flush(self, counters: Mapping[str, int], *, now: float) -> bool:
        with self._lock:
            if self._text and now - self._sent >= COALESCE_S:
                self._sent = now
                self._send("")
            return bool(self._text)

    def gone(self) -> bool:
        return self._reply.gone()

    def end(self) -> None:
        self._reply.end()

    def _send(self, finish_reason: str) -> None:
        values: dict[Tensor, Any] = {contracts.GENERATED_TEXT: self._text, contracts.FINISH_REASON: finish_reason}
        if self._logprobs:
            values[contracts.LOGPROBS] = pack_entries(self._logprobs)
        self._text, self._logprobs = "", []
        self._reply.send(values, final=bool(finish_reason))
