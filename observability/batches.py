"""What is put in from any thread comes out in batches, on a thread of its own: nobody who ends a span waits.

The thread begins with the first, and again in a forked child, which has nothing of its parent's. Knows no span.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class Batches(Generic[T]):
    """`take` gets up to `most` of them at a time, `gather_s` after the first came, or when so many are there."""

    def __init__(
        self, name: str, take: Callable[[list[T]], object], *, gather_s: float, most: int, most_waiting: int
    ) -> None:
        self._name = name
        self._take = take
        self._gather_s = gather_s
        self._most = most
        self._most_waiting = most_waiting
        self._begin()
        again = weakref.WeakMethod(self._begin)
        os.register_at_fork(after_in_child=lambda: (begin := again()) and begin())

    def _begin(self) -> None:
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._taking = 0
        self._idle = self._flushing = self._closing = False
        self.dropped = 0

    def put(self, item: T) -> None:
        """Drops it, and counts that, when too many wait."""
        waiting = self._waiting
        if len(waiting) >= self._most_waiting or self._closing:
            self.dropped += 1
            return
        waiting.append(item)
        if self._thread is None or self._idle or len(waiting) == self._most:
            self._wake()

    def flush(self, timeout_s: float) -> bool:
        """Returns when all that was put in has been taken; False if that takes longer."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not (self._thread and (self._waiting or self._taking)), timeout_s)
            self._flushing = False
        return done

    def close(self, timeout_s: float) -> None:
        """Has what waits taken, and ends the thread, if that takes no longer."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join(timeout_s)

    def _wake(self) -> None:
        with self._changed:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._idle = False
            self._changed.notify_all()

    def _run(self) -> None:
        changed = self._changed
        while True:
            with changed:
                self._taking, self._idle = 0, True
                changed.notify_all()
                changed.wait_for(lambda: self._waiting or self._closing)
                self._idle = False
                changed.wait_for(self._is_due, timeout=self._gather_s)
                if not self._waiting:
                    return
                batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
                self._taking = len(batch)
            try:
                self._take(batch)
            except Exception:  # the next may be better
                log.exception("%s failed", self._name)

    def _is_due(self) -> bool:
        return len(self._waiting) >= self._most or self._flushing or self._closing
