"""One request's deltas, as they come from its lane: merged where they are not read, bounded, and ended in time.

Knows no gRPC: what cancels it is a callback.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gateway.backend import Delta
from gateway.within import within
from pipelines.chat import Event
from pipelines.errors import StageError
from pipelines.logprobs import Entry
from pipelines.terms import time_is_up

MAX_BACKLOG = 128 * 1024  # bytes that wait for one client which has not read for a while: some 2,000 tokens
_SLOW_S = 1.0  # what comes faster than this is a burst, and not a slow client
GRACE_S = 0.25  # after a request's time, for the word of it to come from the engine


class LaneStream:
    """One request's deltas, as they come from its lane (`gateway.backend.Stream`)."""

    def __init__(self, id: str, cancel: Callable[[str], None], accept_timeout_s: float) -> None:
        self.id = id
        self._cancel = cancel
        self._accept_timeout_s: float | None = accept_timeout_s
        self._delta: Delta | None = None  # what has come since the last call
        self._backlog = 0  # about the bytes of it
        self._since = 0.0  # when the first of it came
        self._error: StageError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    async def next(self) -> Delta:
        """What has come since the last call, as one delta: a slow client gets larger ones."""
        while self._delta is None:
            if self._error:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await within(self._accept_timeout_s, self._waiter)
            except asyncio.TimeoutError:
                raise StageError(
                    f"The request was not taken within {self._accept_timeout_s:g} s.",
                    code="timeout",
                    stage="preprocess",
                ) from None
        # From here on silence is legitimate (a queue, a long prefill); heartbeats say that the pipeline lives.
        self._accept_timeout_s = None
        delta, self._delta, self._backlog = self._delta, None, 0
        return delta

    def expire_after(self, seconds: float) -> None:
        """The engine keeps the request's time; here it is seen to that its end is heard, whatever becomes of it."""
        self._timer = asyncio.get_running_loop().call_later(seconds + GRACE_S, self._expire)

    def cancel(self) -> None:
        if self._timer:
            self._timer.cancel()
        if not self._ended:
            self._ended = True
            self._cancel(self.id)

    def _expire(self) -> None:
        if not self._ended:
            self._cancel(self.id)
            self.fail(time_is_up())

    def push(self, event: Event) -> None:
        if self._error:
            return  # the end was told
        if event.error:
            self.fail(event.error)
            return
        self._ended = bool(event.finish_reason)
        _, texts, reason, prompt_tokens, completion_tokens, stages, _, logprobs, cached_tokens, pictures = event
        delta = Delta(texts, reason, prompt_tokens, completion_tokens, stages, logprobs, cached_tokens, pictures)
        if self._delta is None:
            self._delta, self._since = delta, time.monotonic()
        else:
            self._backlog += _size(delta)
            if self._backlog > MAX_BACKLOG and time.monotonic() - self._since > _SLOW_S:
                self._give_up()
                return
            self._delta = _merged(self._delta, delta)
        self._notify()

    def fail(self, error: StageError) -> None:
        self._ended, self._error = True, error
        self._notify()

    def _give_up(self) -> None:
        """The pipeline cannot be held back, and what it says for a client that does not read must not pile up."""
        self._ended, self._delta = True, None
        self._cancel(self.id)
        self.fail(StageError("The answer was not read as fast as it was made.", code="timeout"))

    def _notify(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


def _merged(earlier: Delta, later: Delta) -> Delta:
    return later._replace(
        texts=earlier.texts + later.texts,
        prompt_tokens=earlier.prompt_tokens or later.prompt_tokens,
        pictures=earlier.pictures or later.pictures,
        logprobs=_side_by_side(earlier, later) if earlier.logprobs or later.logprobs else (),
    )


def _size(delta: Delta) -> int:
    """About the memory that it takes in a backlog."""
    entries = sum(1 + len(entry.top) for each in delta.logprobs for entry in each)
    return sum(map(len, delta.texts)) + 60 * len(delta.texts) + 200 * entries


def _side_by_side(*deltas: Delta) -> list[list[Entry]]:
    """The entries of each text; a text that came without any has none."""
    return [entries for delta in deltas for entries in delta.logprobs or [[] for _ in delta.texts]]
