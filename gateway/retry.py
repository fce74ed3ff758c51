"""A request that is asked again where what worked on it was lost before it had said anything to the client.

Over any `Backend`, and a `Stream` like its. What a client has seen of an answer cannot be taken back, so a stream is
asked again until its first text; a `whole` answer is held back here until it is whole, and may begin again until then.
Knows no HTTP, no Triton and no clock: how long there is left, and when a pipeline can take a request again, it is told.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from gateway.backend import Backend, Delta, Stream, Submission
from gateway.within import within
from pipelines.errors import StageError
from pipelines.terms import Terms

RETRIES = 3  # a request that kills whatever takes it does so this often, and no more
PAUSE_S = 0.1  # before the first, and twice as long before each next: a loss is heard of before its pipeline is unready
_LOOK_S = 0.05

Able = Callable[[str], Awaitable[None]]  # returns once the pipeline can take a request; may raise StageError


def when_ready(backend: Backend) -> Able:
    """For a backend whose pipelines come back by themselves."""

    async def able(pipeline: str) -> None:
        while not backend.ready(pipeline):
            await asyncio.sleep(_LOOK_S)

    return able


@dataclass(frozen=True)
class Retry:
    """How the choices of one request are submitted, and submitted again."""

    backend: Backend
    able: Able
    patience_s: float  # for `able`, each time
    left: Callable[[], Terms]  # of the request's own; raises StageError, `timeout`, when no time is
    retried: Callable[[StageError], None]  # is told each time, and what was lost
    whole: bool  # nobody sees the answer before its end

    async def submit(self, submission: Submission) -> RetriedStream:
        return RetriedStream(self, submission, await self.backend.submit(submission))


class RetriedStream:
    """One choice's deltas, whichever attempt they are of (`gateway.backend.Stream`).

    A retry's first delta, which says "accepted", is told like that of the one before it.
    """

    def __init__(self, retry: Retry, submission: Submission, stream: Stream) -> None:
        self.first_text_at = 0.0  # time.perf_counter, 0 before: a whole answer's deltas are told later than that
        self._retry = retry
        self._submission = submission
        self._stream = stream
        self._retries = 0
        self._held: deque[Delta] = deque()
        self._over = False

    async def next(self) -> Delta:
        if self.first_text_at and not self._retry.whole:
            return await self._stream.next()
        while not self._held or self._holding:
            try:
                delta = await self._stream.next()
            except StageError as error:
                if not error.lost:
                    raise
                await self._ask_again(error)
                continue
            self._over = bool(delta.finish_reason)
            self._held.append(delta)
            if not self.first_text_at and (any(delta.texts) or any(delta.logprobs)):
                self.first_text_at = time.perf_counter()
        return self._held.popleft()

    def cancel(self) -> None:
        self._stream.cancel()

    @property
    def _holding(self) -> bool:
        return self._retry.whole and bool(self.first_text_at) and not self._over

    async def _ask_again(self, lost: StageError) -> None:
        """Raises the loss where asking is of no use, or does not become possible in time."""
        self._stream.cancel()
        self._held.clear()
        self.first_text_at = 0.0
        while self._retries < RETRIES:
            await asyncio.sleep(PAUSE_S * 2**self._retries)
            self._retries += 1
            await self._wait(lost)
            self._retry.retried(lost)
            # A new name: what was lost may still be at work on the old one, somewhere.
            submission = replace(
                self._submission, id=f"{self._submission.id}.{self._retries}", terms=self._retry.left()
            )
            try:
                stream = await self._retry.backend.submit(submission)
            except StageError as refused:
                if not refused.lost:
                    raise
                lost = refused
                continue
            self._stream = stream
            return
        raise lost

    async def _wait(self, lost: StageError) -> None:
        timeout_ms = self._retry.left().timeout_ms
        patience_s = self._retry.patience_s if timeout_ms is None else min(self._retry.patience_s, timeout_ms / 1000)
        try:
            await within(patience_s, self._retry.able(self._submission.pipeline))
        except asyncio.TimeoutError:
            self._retry.left()
            raise lost from None
