"""How many requests the pipelines work on at once: the rest wait in order, and past that they are refused.

Knows no HTTP and no pipelines.
"""

from __future__ import annotations

import asyncio
from collections import deque

from pipelines.errors import StageError
from pipelines.terms import time_is_up


class Admission:
    """Hands out `max_concurrency` places. Waiting is first in, first out.

    A request takes a place for each of its choices, all at once; one that wants more than there are has its turn when
    all are free.
    """

    def __init__(self, max_concurrency: int, max_queue: int) -> None:
        self.max_concurrency = max_concurrency
        self.max_queue = max_queue
        self.in_flight = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    @property
    def depth(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def acquire(self, places: int = 1, give_up_after_s: float | None = None) -> None:
        """Returns with the places, which `release` gives back once; without any if it raises or is cancelled."""
        if not self._waiting and self._free(places):
            self.in_flight += places
            return
        if len(self._waiting) >= self.max_queue:
            raise StageError(
                f"The server is at its limit: {self.in_flight} requests in flight and {self.depth} waiting.",
                code="overloaded",
            )
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append((turn, places))
        timer = None if give_up_after_s is None else loop.call_later(give_up_after_s, _give_up, turn)
        try:
            await turn
        except BaseException:
            if (turn, places) in self._waiting:
                self._waiting.remove((turn, places))
                self._hand_on()  # it may have been what held the others up
            elif not turn.cancelled() and not turn.exception():  # cancelled in the very moment it got its places
                self.release(places)
            raise
        finally:
            if timer:
                timer.cancel()

    def release(self, places: int = 1) -> None:
        """Gives the places to the first that still wait, or frees them."""
        self.in_flight -= places
        self._hand_on()

    def _free(self, places: int) -> bool:
        return not self.in_flight or self.in_flight + places <= self.max_concurrency

    def _hand_on(self) -> None:
        while self._waiting:
            turn, places = self._waiting[0]
            if not turn.done():
                if not self._free(places):
                    return
                self.in_flight += places
                turn.set_result(None)
            self._waiting.popleft()


def _give_up(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_exception(time_is_up())
