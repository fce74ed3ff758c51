"""How many requests the pipelines work on at once: the rest wait in order, and past that they are refused.

Knows no HTTP and no pipelines.
"""

from __future__ import annotations

import asyncio
from collections import deque

from pipelines.errors import StageError


class Admission:
    """Hands out `max_concurrency` places. Waiting is first in, first out."""

    def __init__(self, max_concurrency: int, max_queue: int) -> None:
        self.max_concurrency = max_concurrency
        self.max_queue = max_queue
        self.in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def depth(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def acquire(self) -> None:
        """Returns with a place, which `release` gives back once; without one if it raises or is cancelled."""
        if self.in_flight < self.max_concurrency:  # nobody can be waiting then: a freed place is handed on
            self.in_flight += 1
            return
        if len(self._waiting) >= self.max_queue:
            raise StageError(
                f"The server is at its limit: {self.in_flight} requests in flight and {self.depth} waiting.",
                code="overloaded",
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # cancelled in the very moment it got its place
                self.release()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def release(self) -> None:
        """Gives the place to the first that still waits, or frees it."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.in_flight -= 1
