"""The lifecycle's rules: one event in, the actions it calls for out.

    cold → loading → ready ⇄ parked → draining → cold, and failed (with a backoff)

Knows no clock, no I/O, no asyncio and no Triton: whoever drives it (one writer) carries out the actions, reports the
end of each, and Ticks at `next_tick` at the latest. An event that no longer applies, such as the end of a request that
is not known any more, does nothing: those races are the driver's life.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from typing import Any

from gateway.lifecycle import estimate
from gateway.lifecycle.budget import NOTHING, Budget, Memory
from gateway.lifecycle.plan import Planner, Step
from gateway.lifecycle.requests import Requests
from gateway.lifecycle.rows import Row
from gateway.lifecycle.states import (
    Action,
    AdminLoad,
    AdminPark,
    AdminUnload,
    Asked,
    CatalogChanged,
    Event,
    Finished,
    Gone,
    Limits,
    Load,
    Loaded,
    LoadFailed,
    Lost,
    Park,
    Parked,
    Pin,
    Policy,
    State,
    Tick,
    Unload,
    Unloaded,
    Unpin,
    View,
    Wake,
    Why,
    Woken,
    Work,
)


class Scheduler:
    """All pipelines of one budget."""

    def __init__(self, limits: Limits, policies: Mapping[str, Policy], now: float) -> None:
        self._limits = limits
        self._now = now
        self._budget = Budget(limits.memory)
        self._rows: dict[str, Row] = {}
        self._requests = Requests(limits, self._budget)
        self._alarms: list[tuple[float, str]] = []  # a heap of when to look at which pipeline; "" is the plan
        self._plan_due = True
        self._blocked = False  # the last plan left somebody without memory
        self._plan_at = math.inf
        self._actions = self._requests.actions
        self._handlers: dict[type, Callable[[Any], None]] = {
            Asked: self._asked,
            Finished: self._finished,
            Gone: self._gone,
            Loaded: self._loaded,
            LoadFailed: self._load_failed,
            Parked: self._parked,
            Woken: self._woken,
            Unloaded: self._unloaded,
            Lost: self._lost,
            Tick: lambda event: None,
            Pin: self._pin,
            Unpin: self._unpin,
            AdminLoad: self._admin_load,
            AdminUnload: self._admin_unload,
            AdminPark: self._admin_park,
            CatalogChanged: self._catalog_changed,
        }
        for name, policy in policies.items():
            self._rows[name] = Row(name, policy, limits.half_life_s, now)

    # What a driver uses.

    def step(self, event: Event) -> list[Action]:
        self._actions = self._requests.actions = []
        self._now = max(self._now, event.now)
        self._expire()
        self._handlers[type(event)](event)
        self._ring()
        while self._plan_due:
            self._carry_out_plan()
        return self._actions

    @property
    def next_tick(self) -> float | None:
        """When something is due that no other event may bring; early is harmless, late is not."""
        due = -math.inf if self._plan_due else self._requests.next_deadline()
        if self._alarms:
            due = min(due, self._alarms[0][0])
        return None if due == math.inf else due

    def eta(self, pipeline: str, now: float) -> float:
        """Seconds until the pipeline is ready, or would be if it were asked for now."""
        return estimate.ready_in(self._rows[pipeline], self._rows.values(), self._limits, now)

    def views(self, now: float) -> list[View]:
        return [self.view(name, now) for name, row in self._rows.items() if not row.removed]

    def view(self, pipeline: str, now: float) -> View:
        row = self._rows[pipeline]
        return estimate.view(row, self._budget.held(pipeline), self.eta(pipeline, now), now)

    @property
    def memory_used(self) -> Memory:
        return self._budget.used

    def _known(self, pipeline: str) -> Row | None:
        row = self._rows.get(pipeline)
        return None if row is None or row.removed else row

    # Requests.

    def _asked(self, event: Asked) -> None:
        row = self._known(event.pipeline)
        if row is None:
            self._requests.refuse(
                event.request, event.pipeline, "model_not_found", f"There is no model '{event.pipeline}'."
            )
        elif self._requests.ask(row, event, self._now, self.eta(row.name, self._now)) and row.state is not State.READY:
            self._plan_due = True

    def _finished(self, event: Finished) -> None:
        if row := self._requests.finish(event.request, self._now):
            self._freed(row)

    def _gone(self, event: Gone) -> None:
        if row := self._requests.leave(event.request) or self._requests.finish(event.request, self._now):
            self._freed(row)  # it may have been what held the others up

    def _expire(self) -> None:
        """All whose deadline has come, before anybody behind them starts."""
        late = self._requests.late(self._now)
        for row, waiter in late:
            self._requests.refuse_late(row, waiter, self.eta(row.name, self._now))
        for row in {row.name: row for row, _ in late}.values():
            self._freed(row)
            self._plan_due = True  # others may have waited behind it

    def _freed(self, row: Row) -> None:
        """Places, or the head of the queue, are free: the next start, or the row rests."""
        if row.state is State.READY:
            self._requests.fill(row, self._now)
        self._settle(row)

    # Time.

    def _ring(self) -> None:
        while self._alarms and self._alarms[0][0] <= self._now:
            at, name = heapq.heappop(self._alarms)
            if not name:
                self._plan_at = math.inf
                self._plan_due = True
            elif (row := self._rows.get(name)) is not None and row.armed == at:
                row.armed = math.inf
                self._settle(row)

    def _arm(self, row: Row, at: float) -> None:
        """Look at the row then. An alarm that is early looks again, so one that is set is enough."""
        if at < row.armed and at < math.inf:
            row.armed = at
            heapq.heappush(self._alarms, (at, row.name))

    # What a row does when nothing is being done to it.

    def _settle(self, row: Row) -> None:
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
        elif row.state is State.FAILED and row.wanted is not None and self._now < row.retry_at:
            self._arm(row, row.retry_at)
        else:
            self._plan_due = True

    def _settle_ready(self, row: Row) -> None:
        if row.leaves is not None:
            self._drain(row, row.leaves)
        elif row.running or row.queue:
            return
        elif row.rests:
            self._park(row, Why.ADMIN)
        elif not row.pinned and self._now >= row.keep_until:
            self._park(row, Why.IDLE)
        else:
            self._plan_due = self._plan_due or self._blocked  # an idle one may make room
            if not row.pinned:
                self._arm(row, row.keep_until)

    def _settle_parked(self, row: Row) -> None:
        if row.leaves is not None:
            self._drain(row, row.leaves)
        elif row.queue or row.wanted is not None:
            self._plan_due = True
        elif row.pinned:
            return
        elif self._now >= row.parked_since + row.policy.park_s:
            self._drain(row, Why.IDLE)
        else:
            self._plan_due = self._plan_due or self._blocked
            self._arm(row, row.parked_since + row.policy.park_s)

    # Into memory and out of it.

    def _carry_out_plan(self) -> None:
        self._plan_due = False
        plan = Planner(self._rows.values(), self._budget, self._limits, self._now).plan()
        for step, row in plan.steps:
            if step is Step.LOAD:
                self._load(row)
            elif step is Step.WAKE:
                self._wake(row)
            elif step is Step.PARK:
                self._park(row, Why.EVICTED)
            elif step is Step.DRAIN:
                self._drain(row, Why.EVICTED)
            else:
                self._give_up(row)
        self._blocked = plan.blocked
        if plan.again_at < self._plan_at:  # one that comes earlier will have it decided again
            self._plan_at = plan.again_at
            heapq.heappush(self._alarms, (plan.again_at, ""))

    def _begin(self, row: Row, work: Work) -> None:
        row.work, row.work_since = work, self._now
        self._plan_due = self._plan_due or self._blocked  # there will be more memory, or less

    def _load(self, row: Row) -> None:
        self._budget.reserve(row.name, row.memory)
        row.state, row.leaves, row.rests = State.LOADING, None, False
        self._begin(row, Work.LOAD)
        self._actions.append(Load(row.name))

    def _wake(self, row: Row) -> None:
        self._budget.reserve(row.name, row.memory.most(self._budget.held(row.name)))
        self._begin(row, Work.WAKE)
        self._actions.append(Wake(row.name))

    def _park(self, row: Row, why: Why) -> None:
        row.rests = False
        held = self._budget.held(row.name)
        both = held if row.parked is None else held.most(row.parked)
        if not row.can_park or not both.minus(held).within(self._budget.free.most(NOTHING)):
            self._drain(row, why)
            return
        self._budget.reserve(row.name, both)
        row.state = State.PARKED
        self._begin(row, Work.PARK)
        self._actions.append(Park(row.name, why))

    def _drain(self, row: Row, why: Why) -> None:
        """Starts nothing more, and is unloaded when what runs has ended."""
        row.state, row.drains_for = State.DRAINING, why
        self._plan_due = self._plan_due or self._blocked  # with this one's memory there may be a way
        if not row.running:
            self._unload(row)

    def _unload(self, row: Row) -> None:
        self._begin(row, Work.UNLOAD)
        self._actions.append(Unload(row.name, row.drains_for))

    def _give_up(self, row: Row) -> None:
        row.wanted = None
        row.reason = f"it needs {row.memory}, and there is only {self._limits.memory} for all models"
        self._requests.refuse_all(row, "unavailable", f"'{row.name}' cannot be loaded: {row.reason}.", estimate.NEVER_S)
        self._settle(row)

    # What the work on a pipeline came to.

    def _ended(self, pipeline: str, work: Work) -> Row | None:
        row = self._rows.get(pipeline)
        if row is None or row.work is not work:
            return None
        row.work = None
        self._plan_due = True
        return row

    def _loaded(self, event: Loaded) -> None:
        if row := self._ended(event.pipeline, Work.LOAD):
            row.load_s.add(self._now - row.work_since)
            row.phases, row.reason = event.phases, ""
            self._ready(row, event.memory)

    def _woken(self, event: Woken) -> None:
        if row := self._ended(event.pipeline, Work.WAKE):
            row.wake_s.add(self._now - row.work_since)
            self._ready(row, event.memory)

    def _ready(self, row: Row, measured: Memory | None) -> None:
        row.memory = measured or row.memory
        self._budget.correct(row.name, row.memory)
        row.state, row.wanted, row.ready_since = State.READY, None, self._now
        row.keep_until = max(row.keep_until, self._now + row.policy.keep_alive) if not row.queue else self._now
        if row.leaves is None:
            self._requests.fill(row, self._now)
        self._settle(row)

    def _parked(self, event: Parked) -> None:
        if row := self._ended(event.pipeline, Work.PARK):
            row.parked = event.memory or row.parked
            self._budget.correct(row.name, row.parked or NOTHING)
            row.parked_since = self._now
            row.failures = 0
            self._settle(row)

    def _unloaded(self, event: Unloaded) -> None:
        if row := self._ended(event.pipeline, Work.UNLOAD):
            row.failures = 0
            self._cold(row)

    def _cold(self, row: Row) -> None:
        self._budget.release(row.name)
        row.state, row.leaves, row.rests, row.work = State.COLD, None, False, None
        row.measure_anew()
        row.keep_until = self._now
        self._plan_due = True
        if row.removed:
            del self._rows[row.name]
        elif row.pinned and row.wanted is None:
            row.wanted = self._now

    def _load_failed(self, event: LoadFailed) -> None:
        if row := self._ended(event.pipeline, Work.LOAD):
            self._failed(row, event.reason)

    def _lost(self, event: Lost) -> None:
        row = self._rows.get(event.pipeline)
        if row is None or row.state in (State.COLD, State.FAILED):
            return
        was, row.work = row.state, None
        self._requests.lose(row)
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
        if row.memory.within(self._budget.free):
            self._load(row)
        else:
            row.wanted = self._now

    def _failures_until_now(self, row: Row) -> int:
        stable = row.state is State.READY and self._now >= row.ready_since + self._limits.stable_s
        return 0 if stable else row.failures

    def _failed(self, row: Row, reason: str) -> None:
        if row.leaves is Why.CATALOG:  # what failed is not what would be loaded now
            self._cold(row)
            return
        failures = self._failures_until_now(row)
        self._cold(row)
        row.failures = failures + 1
        row.state, row.reason = State.FAILED, reason
        backoff = min(self._limits.backoff_s * 2.0 ** min(failures, 30), self._limits.max_backoff_s)
        row.retry_at = self._now + backoff
        row.wanted = row.retry_at if row.pinned else None
        self._requests.refuse_all(row, "unavailable", f"'{row.name}' could not be loaded: {reason}", backoff)
        self._settle(row)

    # What an operator asks for.

    def _operated(self, pipeline: str) -> Row | None:
        self._plan_due = True  # who may be evicted has changed
        return self._known(pipeline)

    def _pin(self, event: Pin) -> None:
        if row := self._operated(event.pipeline):
            self._keep(row)
            self._settle(row)

    def _keep(self, row: Row) -> None:
        """Pin it: what has not left yet stays, the rest comes back."""
        row.pinned = True
        if row.leaves is Why.ADMIN:
            row.leaves = None
        if row.state is State.DRAINING and row.work is None and row.drains_for is not Why.CATALOG:
            row.state = State.READY
            self._plan_due = True  # its memory was promised
            self._requests.fill(row, self._now)
        if row.state not in (State.READY, State.LOADING) and row.wanted is None:
            row.wanted = self._now

    def _unpin(self, event: Unpin) -> None:
        if row := self._operated(event.pipeline):
            row.pinned, row.wanted = False, None
            self._settle(row)

    def _admin_load(self, event: AdminLoad) -> None:
        if row := self._operated(event.pipeline):
            row.rests = False
            if row.leaves is Why.ADMIN:
                row.leaves = None
            if row.state not in (State.READY, State.LOADING):
                row.wanted = self._now
                row.retry_at = self._now
            self._settle(row)

    def _admin_unload(self, event: AdminUnload) -> None:
        if row := self._operated(event.pipeline):
            row.pinned, row.wanted = False, None
            if row.state is State.LOADING or row.work in (Work.PARK, Work.WAKE):
                row.leaves = row.leaves or Why.ADMIN
            elif row.state in (State.READY, State.PARKED):
                self._drain(row, Why.ADMIN)
            else:
                self._settle(row)

    def _admin_park(self, event: AdminPark) -> None:
        if (row := self._operated(event.pipeline)) and row.state in (State.READY, State.LOADING):
            row.rests = True
            self._settle(row)

    def _catalog_changed(self, event: CatalogChanged) -> None:
        for name, policy in event.policies.items():
            if (row := self._rows.get(name)) is None:
                self._rows[name] = Row(name, policy, self._limits.half_life_s, self._now)
            else:
                self._change(row, policy)
        for name in event.removed:
            if (row := self._rows.get(name)) is not None:
                self._remove(row)
        self._plan_due = True

    def _change(self, row: Row, policy: Policy) -> None:
        fresh = policy.version != row.policy.version or row.removed
        pinned_before, row.removed = row.policy.pin and not row.removed, False
        row.adopt(policy)
        if policy.pin and not pinned_before:
            self._keep(row)
        elif pinned_before and not policy.pin:
            row.pinned, row.wanted = False, None
        if fresh and row.state is State.FAILED:
            row.state, row.failures, row.retry_at, row.reason = State.COLD, 0, self._now, ""
        if fresh and row.state is not State.COLD:
            row.leaves = Why.CATALOG
        if row.pinned and row.state is State.COLD:
            row.wanted = self._now
        if row.state is State.READY:
            self._requests.fill(row, self._now)
        self._settle(row)

    def _remove(self, row: Row) -> None:
        row.removed, row.pinned, row.wanted = True, False, None
        self._requests.refuse_all(row, "model_not_found", f"There is no model '{row.name}' any more.")
        if row.state in (State.COLD, State.FAILED):
            del self._rows[row.name]
        else:
            row.leaves = Why.CATALOG
            self._settle(row)
