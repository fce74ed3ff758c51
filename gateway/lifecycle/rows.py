"""What the scheduler keeps of one pipeline, and the order in which its requests wait.

Knows neither the other pipelines nor the budget.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from gateway.lifecycle.budget import Memory
from gateway.lifecycle.eviction import Frequency
from gateway.lifecycle.states import Policy, State, Why, Work

PRIORITY_S = 10.0  # of waiting, that a step of priority is worth


class Waiter(NamedTuple):
    """A request that waits. Compared by `key`: when it came, or would have, were it as urgent as the others.

    The key never changes, so whatever comes later is behind it from some moment on: nothing waits for ever.
    """

    key: float
    number: int
    request: str
    arrived: float
    deadline: float
    keep_alive: float
    places: int


class Queue:
    """Waiters, the most urgent first."""

    def __init__(self) -> None:
        self._waiters: list[Waiter] = []

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter]:
        return iter(self._waiters)

    @property
    def first(self) -> Waiter:
        return self._waiters[0]

    def add(self, waiter: Waiter) -> None:
        insort(self._waiters, waiter)

    def remove(self, waiter: Waiter) -> None:
        del self._waiters[bisect_left(self._waiters, waiter)]

    def take(self, count: int) -> None:
        """Removes the first `count`."""
        del self._waiters[:count]


class Runner(NamedTuple):
    """A request that has been started."""

    started: float
    keep_alive: float
    places: int


class Average:
    """Of measured seconds, the newest counting half; the declared until there is one."""

    __slots__ = ("_measured", "declared")

    def __init__(self, declared: float) -> None:
        self.declared = declared
        self._measured: float | None = None

    @property
    def value(self) -> float:
        return self.declared if self._measured is None else self._measured

    def add(self, seconds: float) -> None:
        self._measured = seconds if self._measured is None else (self._measured + seconds) / 2


class Row:
    """One pipeline. Times are those of events."""

    def __init__(self, name: str, policy: Policy, half_life_s: float, now: float) -> None:
        self.name = name
        self.policy = policy
        self.state = State.COLD
        self.work: Work | None = None
        self.work_since = now
        self.pinned = policy.pin
        self.wanted: float | None = now if policy.pin else None  # since when it is to be loaded, asked for or not
        self.drains_for = Why.IDLE
        self.leaves: Why | None = None  # what it is to be unloaded for, as soon as it can
        self.removed = False
        self.rests = False  # parked when idle next
        self.queue = Queue()
        self.running: dict[str, Runner] = {}
        self.places = 0
        self.keep_until = now
        self.ready_since = now
        self.parked_since = now
        self.failures = 0
        self.reason = ""
        self.retry_at = -math.inf
        self.armed = math.inf  # when the scheduler looks at it next
        self.frequency = Frequency(half_life_s)
        self.phases: Mapping[str, float] = {}
        self.service_s = Average(1.0)
        self._measures = _measured_of(policy)
        self.memory = policy.memory  # as measured, once it has been
        self.parked = policy.parked
        self.load_s = Average(policy.load_s)
        self.wake_s = Average(policy.wake_s)

    def adopt(self, policy: Policy) -> None:
        """What is loaded stays measured as it is; another version is measured anew."""
        self.policy = policy
        self.load_s.declared, self.wake_s.declared = policy.load_s, policy.wake_s
        if self.state in (State.COLD, State.FAILED):
            self.measure_anew()

    def measure_anew(self) -> None:
        """Now that it is not loaded: if what would be is not, or is not said to be, what was measured."""
        if self._measures != _measured_of(self.policy):
            self._measures = _measured_of(self.policy)
            self.memory, self.parked = self.policy.memory, self.policy.parked
            self.load_s, self.wake_s = Average(self.policy.load_s), Average(self.policy.wake_s)

    @property
    def can_park(self) -> bool:
        return self.parked is not None and self.policy.keep_parked > 0

    @property
    def key(self) -> float:
        """Its place among those that want memory: its most urgent waiter's, or when it was wanted."""
        wanted = math.inf if self.wanted is None else self.wanted + self.policy.priority * PRIORITY_S
        return min(self.queue.first.key, wanted) if self.queue else wanted

    def wants_memory(self, now: float) -> bool:
        if self.work is not None or self.removed:
            return False
        if self.state is State.PARKED:
            return bool(self.queue) or self.wanted is not None
        if self.state is State.FAILED:
            return now >= self.retry_at and (bool(self.queue) or self.wanted is not None)
        return self.state is State.COLD and (bool(self.queue) or self.wanted is not None)

    def has_places(self, places: int) -> bool:
        """A request that wants more than there are has its turn when all are free."""
        return not self.places or self.places + places <= self.policy.max_concurrency

    def is_full(self, *, batch: bool) -> bool:
        """A quarter of the queue is left to those who are not batch: these are not refused for who can wait."""
        spare = max(0, self.policy.max_concurrency - self.places)  # taken by the first that wait, once it is ready
        kept = self.policy.max_queue // 4 if batch else 0
        return len(self.queue) >= self.policy.max_queue + spare - kept

    def start(self, waiter: Waiter, now: float) -> None:
        self.running[waiter.request] = Runner(now, waiter.keep_alive, waiter.places)
        self.places += waiter.places

    def finish(self, request: str, now: float) -> None:
        runner = self.running.pop(request)
        self.places -= runner.places
        self.service_s.add(now - runner.started)
        self.frequency.use(now)
        # A client can lengthen the others' time, up to the cap, and shorten but its own.
        self.keep_until = max(self.keep_until, now + runner.keep_alive)


def _measured_of(policy: Policy) -> tuple[str, Memory, Memory | None]:
    return policy.version, policy.memory, policy.parked
