"""One event in, the actions it calls for out: requests, operators, the catalog. What follows in memory: residency.

Knows no clock, no I/O, no asyncio and no Triton: whoever drives it (one writer) carries out the actions, reports the
end of each, and Ticks at `next_tick` at the latest. An event that no longer applies, such as the end of a request that
is not known any more, does nothing: those races are the driver's life.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from gateway.lifecycle import estimate
from gateway.lifecycle.budget import Memory
from gateway.lifecycle.residency import Residency
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
    Loaded,
    LoadFailed,
    Lost,
    Parked,
    Pin,
    Policy,
    State,
    Tick,
    Unloaded,
    Unpin,
    View,
    Why,
    Woken,
    Work,
)


class Scheduler:
    """All pipelines of one budget."""

    def __init__(self, limits: Limits, policies: Mapping[str, Policy], now: float) -> None:
        self._limits = limits
        self._residency = Residency(limits, now)
        self._rows = self._residency.rows
        self._requests = self._residency.requests
        self._handlers: dict[type, Callable[[Any], None]] = {
            Asked: self._asked,
            Finished: self._finished,
            Gone: self._gone,
            Loaded: self._residency.loaded,
            LoadFailed: self._residency.load_failed,
            Parked: self._residency.parked,
            Woken: self._residency.woken,
            Unloaded: self._residency.unloaded,
            Lost: self._residency.lost,
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
        actions: list[Action] = []
        self._requests.actions = actions
        self._residency.now = max(self._now, event.now)
        self._expire()
        self._handlers[type(event)](event)
        self._residency.ring()
        while self._residency.plan_due:
            self._residency.carry_out_plan()
        return actions

    @property
    def next_tick(self) -> float | None:
        """When something is due that no other event may bring; early is harmless, late is not."""
        if self._residency.plan_due:
            return self._now
        due = min(self._requests.next_deadline(), self._residency.next_alarm)
        return None if due == math.inf else due

    def eta(self, pipeline: str, now: float) -> float:
        """Seconds until the pipeline is ready, or would be if it were asked for now."""
        return estimate.ready_in(self._rows[pipeline], self._rows.values(), self._limits, now)

    def views(self, now: float) -> list[View]:
        return [self.view(name, now) for name, row in self._rows.items() if not row.removed]

    def view(self, pipeline: str, now: float) -> View:
        row = self._rows[pipeline]
        return estimate.view(row, self._residency.budget.held(pipeline), self.eta(pipeline, now), now)

    def runs(self, request: str) -> bool:
        return self._requests.runs(request)

    def waiting(self, pipeline: str) -> int:
        """How many requests wait for it."""
        row = self._known(pipeline)
        return len(row.queue) if row else 0

    @property
    def memory_used(self) -> Memory:
        return self._residency.budget.used

    @property
    def memory_total(self) -> Memory:
        return self._limits.memory

    @property
    def _now(self) -> float:
        return self._residency.now

    def _known(self, pipeline: str) -> Row | None:
        row = self._rows.get(pipeline)
        return None if row is None or row.removed else row

    # Requests.

    def _asked(self, event: Asked) -> None:
        row = self._known(event.pipeline)
        if row is None:
            reason = f"There is no model '{event.pipeline}'."
            self._requests.refuse(event.request, event.pipeline, "model_not_found", reason)
        elif self._requests.ask(row, event, self._now, self.eta(row.name, self._now)) and row.state is not State.READY:
            self._residency.plan_due = True

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

    def _freed(self, row: Row) -> None:
        """Places, or the head of the queue, are free: the next start, or the row rests."""
        if row.state is State.READY:
            self._requests.fill(row, self._now)
        self._residency.settle(row)

    # What an operator asks for.

    def _operated(self, pipeline: str) -> Row | None:
        self._residency.plan_due = True  # who may be evicted has changed
        return self._known(pipeline)

    def _pin(self, event: Pin) -> None:
        if row := self._operated(event.pipeline):
            self._keep(row)
            self._residency.settle(row)

    def _keep(self, row: Row) -> None:
        """Pin it: what has not left yet stays, the rest comes back."""
        row.pinned = True
        if row.leaves is Why.ADMIN:
            row.leaves = None
        if row.state is State.DRAINING and row.work is None and row.drains_for is not Why.CATALOG:
            row.state = State.READY
            self._residency.plan_due = True  # its memory was promised
            self._requests.fill(row, self._now)
        if row.state not in (State.READY, State.LOADING) and row.wanted is None:
            row.wanted = self._now

    def _unpin(self, event: Unpin) -> None:
        if row := self._operated(event.pipeline):
            row.pinned, row.wanted = False, None
            self._residency.settle(row)

    def _admin_load(self, event: AdminLoad) -> None:
        if row := self._operated(event.pipeline):
            row.rests = False
            if row.leaves is Why.ADMIN:
                row.leaves = None
            if row.state not in (State.READY, State.LOADING):
                row.wanted = self._now
                row.retry_at = self._now
            self._residency.settle(row)

    def _admin_unload(self, event: AdminUnload) -> None:
        if row := self._operated(event.pipeline):
            row.pinned, row.wanted = False, None
            if row.state is State.LOADING or row.work in (Work.PARK, Work.WAKE):
                row.leaves = row.leaves or Why.ADMIN
            elif row.state in (State.READY, State.PARKED):
                self._residency.drain(row, Why.ADMIN)
            else:
                self._residency.settle(row)

    def _admin_park(self, event: AdminPark) -> None:
        if (row := self._operated(event.pipeline)) and row.state in (State.READY, State.LOADING):
            row.rests = True
            self._residency.settle(row)

    def _catalog_changed(self, event: CatalogChanged) -> None:
        for name, policy in event.policies.items():
            if (row := self._rows.get(name)) is None:
                self._rows[name] = Row(name, policy, self._limits.half_life_s, self._now)
            else:
                self._change(row, policy)
        for name in event.removed:
            if (row := self._rows.get(name)) is not None:
                self._remove(row)
        self._residency.plan_due = True

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
        self._residency.settle(row)

    def _remove(self, row: Row) -> None:
        row.removed, row.pinned, row.wanted = True, False, None
        self._requests.refuse_all(row, "model_not_found", f"There is no model '{row.name}' any more.")
        if row.state in (State.COLD, State.FAILED):
            del self._rows[row.name]
        else:
            row.leaves = Why.CATALOG
            self._residency.settle(row)
