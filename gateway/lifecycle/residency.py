"""Into memory and out of it: what each pipeline does next by its own terms, and by the plan for all of them.

    cold → loading → ready ⇄ parked → draining → cold, and failed (with a backoff)

Knows the requests only as those that wait for a pipeline and run in it. The scheduler calls it, and tells it the time.
"""

from __future__ import annotations

import heapq
import math

from gateway.lifecycle import estimate
from gateway.lifecycle.budget import NOTHING, Budget, Memory
from gateway.lifecycle.plan import Planner, Step
from gateway.lifecycle.requests import Requests
from gateway.lifecycle.rows import Row
from gateway.lifecycle.states import (
    Limits,
    Load,
    Loaded,
    LoadFailed,
    Lost,
    Park,
    Parked,
    State,
    Unload,
    Unloaded,
    Wake,
    Why,
    Woken,
    Work,
)


class Residency:
    """The rows, the budget and the alarms. `plan_due`: something has changed by which the plan might."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.now = now
        self.rows: dict[str, Row] = {}
        self.budget = Budget(limits.memory)
        self.requests = Requests(limits, self.budget)
        self.plan_due = True
        self._blocked = False  # the last plan left somebody without memory
        self._plan_at = math.inf
        self._alarms: list[tuple[float, str]] = []  # a heap of when to look at which pipeline; "" is the plan

    # Time.

    @property
    def next_alarm(self) -> float:
        return self._alarms[0][0] if self._alarms else math.inf

    def ring(self) -> None:
        while self._alarms and self._alarms[0][0] <= self.now:
            at, name = heapq.heappop(self._alarms)
            if not name:
                self._plan_at = math.inf
                self.plan_due = True
            elif (row := self.rows.get(name)) is not None and row.armed == at:
                row.armed = math.inf
                self.settle(row)

    def _arm(self, row: Row, at: float) -> None:
        """Look at the row then. An alarm that is early looks again, so one that is set is enough."""
        if at < row.armed and at < math.inf:
            row.armed = at
            heapq.heappush(self._alarms, (at, row.name))

    # What a row does when nothing is being done to it.

    def settle(self, row: Row) -> None:
        """Out, parked, unloaded or left, by what is due; the alarm is set for what will be."""
        if row.work is not None:
            return
        if row.state is State.DRAINING:
            if not row.running:
                self._unload(row)
        elif row.state is State.READY:
            self._settle_ready(row)
        elif row.state is State.PARKED:
            self._settle_parked(row)
        elif row.state is State.FAILED and row.wanted is not None and self.now < row.retry_at:
            self._arm(row, row.retry_at)
        else:
            self.plan_due = True

    def _settle_ready(self, row: Row) -> None:
        if row.leaves is not None:
            self.drain(row, row.leaves)
        elif row.running or row.queue:
            return
        elif row.rests:
            self._park(row, Why.ADMIN)
        elif not row.pinned and self.now >= row.keep_until:
            self._park(row, Why.IDLE)
        else:
            self.plan_due = self.plan_due or self._blocked  # an idle one may make room
            if not row.pinned:
                self._arm(row, row.keep_until)

    def _settle_parked(self, row: Row) -> None:
        if row.leaves is not None:
            self.drain(row, row.leaves)
        elif row.queue or row.wanted is not None:
            self.plan_due = True
        elif row.pinned:
            return
        elif self.now >= row.parked_since + row.policy.keep_parked:
            self.drain(row, Why.IDLE)
        else:
            self.plan_due = self.plan_due or self._blocked
            self._arm(row, row.parked_since + row.policy.keep_parked)

    # Into memory and out of it.

    def carry_out_plan(self) -> None:
        self.plan_due = False
        plan = Planner(self.rows.values(), self.budget, self.limits, self.now).plan()
        for step, row in plan.steps:
            if step is Step.LOAD:
                self._load(row)
            elif step is Step.WAKE:
                self._wake(row)
            elif step is Step.PARK:
                self._park(row, Why.EVICTED)
            elif step is Step.DRAIN:
                self.drain(row, Why.EVICTED)
            else:
                self._give_up(row)
        self._blocked = plan.blocked
        if plan.again_at < self._plan_at:  # one that comes earlier will have it decided again
            self._plan_at = plan.again_at
            heapq.heappush(self._alarms, (plan.again_at, ""))

    def _begin(self, row: Row, work: Work) -> None:
        row.work, row.work_since = work, self.now
        self.plan_due = self.plan_due or self._blocked  # there will be more memory, or less

    def _load(self, row: Row) -> None:
        self.budget.reserve(row.name, row.memory)
        row.state, row.leaves, row.rests = State.LOADING, None, False
        self._begin(row, Work.LOAD)
        self.requests.actions.append(Load(row.name))

    def _wake(self, row: Row) -> None:
        self.budget.reserve(row.name, row.memory.most(self.budget.held(row.name)))
        self._begin(row, Work.WAKE)
        self.requests.actions.append(Wake(row.name))

    def _park(self, row: Row, why: Why) -> None:
        row.rests = False
        held = self.budget.held(row.name)
        both = held if row.parked is None else held.most(row.parked)
        if not row.can_park or not both.minus(held).within(self.budget.free.most(NOTHING)):
            self.drain(row, why)
            return
        self.budget.reserve(row.name, both)
        row.state = State.PARKED
        self._begin(row, Work.PARK)
        self.requests.actions.append(Park(row.name, why))

    def drain(self, row: Row, why: Why) -> None:
        """Starts nothing more, and is unloaded when what runs has ended."""
        row.state, row.drains_for = State.DRAINING, why
        self.plan_due = self.plan_due or self._blocked  # with this one's memory there may be a way
        if not row.running:
            self._unload(row)

    def _unload(self, row: Row) -> None:
        self._begin(row, Work.UNLOAD)
        self.requests.actions.append(Unload(row.name, row.drains_for))

    def _give_up(self, row: Row) -> None:
        row.wanted = None
        row.reason = f"it needs {row.memory}, and there is only {self.limits.memory} for all models"
        self.requests.refuse_all(row, "unavailable", f"'{row.name}' cannot be loaded: {row.reason}.", estimate.NEVER_S)
        self.settle(row)

    # What the work on a pipeline came to.

    def _ended(self, pipeline: str, work: Work) -> Row | None:
        row = self.rows.get(pipeline)
        if row is None or row.work is not work:
            return None
        row.work = None
        self.plan_due = True
        return row

    def loaded(self, event: Loaded) -> None:
        if row := self._ended(event.pipeline, Work.LOAD):
            row.load_s.add(self.now - row.work_since)
            row.phases, row.reason = event.phases, ""
            if not event.can_park:
                row.parked = None
            self._ready(row, event.memory)

    def woken(self, event: Woken) -> None:
        if row := self._ended(event.pipeline, Work.WAKE):
            row.wake_s.add(self.now - row.work_since)
            self._ready(row, event.memory)

    def _ready(self, row: Row, measured: Memory | None) -> None:
        row.memory = measured or row.memory
        self.budget.correct(row.name, row.memory)
        row.state, row.wanted, row.ready_since = State.READY, None, self.now
        row.keep_until = max(row.keep_until, self.now + row.policy.keep_alive) if not row.queue else self.now
        if row.leaves is None:
            self.requests.fill(row, self.now)
        self.settle(row)

    def parked(self, event: Parked) -> None:
        if row := self._ended(event.pipeline, Work.PARK):
            row.parked = event.memory or row.parked
            self.budget.correct(row.name, row.parked or NOTHING)
            row.parked_since = self.now
            row.failures = 0
            self.settle(row)

    def unloaded(self, event: Unloaded) -> None:
        if row := self._ended(event.pipeline, Work.UNLOAD):
            row.failures = 0
            self._cold(row)

    def _cold(self, row: Row) -> None:
        self.budget.release(row.name)
        row.state, row.leaves, row.rests, row.work = State.COLD, None, False, None
        row.measure_anew()
        row.keep_until = self.now
        self.plan_due = True
        if row.removed:
            del self.rows[row.name]
        elif row.pinned and row.wanted is None:
            row.wanted = self.now

    def load_failed(self, event: LoadFailed) -> None:
        if row := self._ended(event.pipeline, Work.LOAD):
            self._failed(row, event.reason)

    def lost(self, event: Lost) -> None:
        row = self.rows.get(event.pipeline)
        if row is None or row.state in (State.COLD, State.FAILED):
            return
        was, row.work = row.state, None
        self.requests.lose(row)
        if was is State.DRAINING:
            self._cold(row)
        elif was is State.READY and self._failures_until_now(row) == 0:
            self._replace(row, event.reason)
        else:
            self._failed(row, event.reason)

    def _replace(self, row: Row, reason: str) -> None:
        """It was in use and dies for the first time: it is loaded at once, in its own place, beside any other load."""
        self._cold(row)
        row.failures, row.reason = 1, reason
        if row.memory.within(self.budget.free):
            self._load(row)
        else:
            row.wanted = self.now

    def _failures_until_now(self, row: Row) -> int:
        stable = row.state is State.READY and self.now >= row.ready_since + self.limits.stable_s
        return 0 if stable else row.failures

    def _failed(self, row: Row, reason: str) -> None:
        if row.leaves is Why.CATALOG:  # what failed is not what would be loaded now
            self._cold(row)
            return
        failures = self._failures_until_now(row)
        self._cold(row)
        row.failures = failures + 1
        row.state, row.reason = State.FAILED, reason
        backoff = min(self.limits.backoff_s * 2.0 ** min(failures, 30), self.limits.max_backoff_s)
        row.retry_at = self.now + backoff
        row.wanted = row.retry_at if row.pinned else None
        self.requests.refuse_all(row, "unavailable", f"'{row.name}' could not be loaded: {reason}", backoff)
        self.settle(row)
