"""The requests of all pipelines: who waits, who runs, whose time is up.

Knows a pipeline's state, and neither how it changes nor memory; answers each request once, into `actions`.
"""

from __future__ import annotations

import heapq
import math

from gateway.lifecycle import estimate
from gateway.lifecycle.budget import Budget
from gateway.lifecycle.rows import PRIORITY_S, Row, Waiter
from gateway.lifecycle.states import Action, Asked, Limits, Refuse, Start, State


class Requests:
    """`actions` is where Start and Refuse go."""

    def __init__(self, limits: Limits, budget: Budget) -> None:
        self._limits = limits
        self._budget = budget
        self._waiting: dict[str, tuple[Row, Waiter]] = {}
        self._running: dict[str, Row] = {}
        self._deadlines: list[tuple[float, str, int]] = []  # a heap; what is not waiting any more is skipped
        self._numbers = 0
        self.actions: list[Action] = []

    def ask(self, row: Row, event: Asked, now: float, eta_s: float) -> bool:
        """Starts, refuses or queues it; whether it waits."""
        if event.request in self._waiting or event.request in self._running:
            raise ValueError(f"request {event.request!r} was asked twice")
        row.frequency.hit(now)
        waiter = self._waiter(row, event, now)
        if event.deadline <= now:
            self.refuse_late(row, waiter, eta_s)
        elif row.state is State.READY and not row.queue and row.has_places(waiter.places):
            self._start(row, waiter, now)
        elif row.state is State.FAILED and now < row.retry_at:
            reason = f"'{row.name}' could not be loaded: {row.reason}"
            self.refuse(waiter.request, row.name, "unavailable", reason, row.retry_at - now)
        elif row.is_full(batch=event.batch):
            self.refuse(waiter.request, row.name, "overloaded", *estimate.overload(row, eta_s))
        else:
            self._queue(row, waiter)
            return True
        return False

    def _waiter(self, row: Row, event: Asked, now: float) -> Waiter:
        self._numbers += 1
        key = now + row.policy.priority * PRIORITY_S + (self._limits.batch_delay_s if event.batch else 0.0)
        keep_alive = row.policy.keep_alive
        if event.keep_alive is not None:
            keep_alive = min(max(event.keep_alive, 0.0), max(self._limits.max_keep_alive, row.policy.keep_alive))
        return Waiter(key, self._numbers, event.request, now, event.deadline, keep_alive, event.places)

    def _queue(self, row: Row, waiter: Waiter) -> None:
        row.queue.add(waiter)
        self._waiting[waiter.request] = (row, waiter)
        if waiter.deadline < math.inf:
            heapq.heappush(self._deadlines, (waiter.deadline, waiter.request, waiter.number))
            if len(self._deadlines) > 2 * len(self._waiting) + 64:  # most are of requests that have long started
                self._deadlines = [held for held in self._deadlines if self._is_waiting(*held[1:])]
                heapq.heapify(self._deadlines)

    def _start(self, row: Row, waiter: Waiter, now: float) -> None:
        row.start(waiter, now)
        self._running[waiter.request] = row
        self.actions.append(Start(waiter.request, row.name))

    def runs(self, request: str) -> bool:
        return request in self._running

    def fill(self, row: Row, now: float) -> None:
        """As many waiters start as there are places for."""
        count = 0
        for waiter in row.queue:
            if not row.has_places(waiter.places):
                break
            del self._waiting[waiter.request]
            self._start(row, waiter, now)
            count += 1
        row.queue.take(count)

    def finish(self, request: str, now: float) -> Row | None:
        """The row that it ran in, if it ran."""
        if (row := self._running.pop(request, None)) is not None:
            row.finish(request, now)
        return row

    def leave(self, request: str) -> Row | None:
        """The row that it waited for, if it waited."""
        if (waiting := self._waiting.pop(request, None)) is None:
            return None
        row, waiter = waiting
        row.queue.remove(waiter)
        return row

    def lose(self, row: Row) -> None:
        """What ran in it has died with it."""
        for request in row.running:
            del self._running[request]
        row.running.clear()
        row.places = 0

    def refuse(self, request: str, pipeline: str, code: str, reason: str, retry_after_s: float | None = None) -> None:
        self.actions.append(Refuse(request, pipeline, code, reason, retry_after_s))

    def refuse_late(self, row: Row, waiter: Waiter, eta_s: float) -> None:
        self.refuse(waiter.request, row.name, *estimate.lateness(row, self._budget, eta_s))

    def refuse_all(self, row: Row, code: str, reason: str, retry_after_s: float | None = None) -> None:
        for waiter in row.queue:
            del self._waiting[waiter.request]
            self.refuse(waiter.request, row.name, code, reason, retry_after_s)
        row.queue.take(len(row.queue))

    def next_deadline(self) -> float:
        """Of those that wait."""
        while self._deadlines and not self._is_waiting(*self._deadlines[0][1:]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf

    def late(self, now: float) -> list[tuple[Row, Waiter]]:
        """Takes out all whose deadline has come: each is to be told so by `refuse_late`."""
        late = []
        while self.next_deadline() <= now:
            late.append(self._waiting[self._deadlines[0][1]])
            self.leave(self._deadlines[0][1])
        return late

    def _is_waiting(self, request: str, number: int) -> bool:
        return request in self._waiting and self._waiting[request][1].number == number
