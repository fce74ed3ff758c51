"""Memory that many share: who asks for some waits until it is free, first come first served.

A burst of large pictures waits here instead of exhausting the machine. Counts only what it is told; knows no picture.
A holder that asks for more can wait for itself, and with others like it forever: ask once, for all that is needed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.terms import time_is_up


class Gate:
    """`capacity` bytes. One who needs more than all of them has its turn when all are free."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a gate needs a capacity of 1 or more bytes, not {capacity}")
        self.capacity = capacity
        self._lock = threading.Lock()
        self._free = capacity
        self._waiting: deque[_Place] = deque()

    @contextmanager
    def of(self, amount: int, timeout: float | None = None) -> Iterator[None]:
        """Holds `amount` bytes while the block runs. StageError, `timeout`, if they are not free in so many seconds."""
        if amount < 0:
            raise ValueError(f"nobody holds {amount} bytes")
        place = _Place(min(amount, self.capacity))
        with self._lock:
            self._waiting.append(place)
            self._admit()
        try:
            if not place.turn.wait(timeout):
                raise time_is_up()
            yield
        finally:
            with self._lock:
                # Its turn may have come between the end of its patience and this line: then it gives back.
                if place.turn.is_set():
                    self._free += place.amount
                else:
                    self._waiting.remove(place)
                self._admit()

    @property
    def held(self) -> int:
        with self._lock:
            return self.capacity - self._free

    @property
    def waiting(self) -> int:
        with self._lock:
            return len(self._waiting)

    def _admit(self) -> None:
        """Only the first may go in: a small one never passes a large one, which would wait forever."""
        while self._waiting and self._waiting[0].amount <= self._free:
            place = self._waiting.popleft()
            self._free -= place.amount
            place.turn.set()


class _Place:
    """One that waits, and then holds."""

    def __init__(self, amount: int) -> None:
        self.amount = amount
        self.turn = threading.Event()
