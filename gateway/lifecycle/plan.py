"""Who comes into memory next, and who leaves it for that: decided anew whenever memory, a load or a waiter changed.

A pure function of the rows and the budget: changes neither. Knows no events.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway.lifecycle.budget import NOTHING, Budget, Memory
from gateway.lifecycle.eviction import Option, choose
from gateway.lifecycle.rows import Row
from gateway.lifecycle.states import Limits, State, Work


class Step(enum.Enum):
    """What to do with a row. DRAIN: unload, when what runs has ended."""

    LOAD = enum.auto()
    WAKE = enum.auto()
    PARK = enum.auto()
    DRAIN = enum.auto()
    GIVE_UP = enum.auto()  # it is larger than all memory


@dataclass
class Plan:
    steps: list[tuple[Step, Row]] = field(default_factory=list)
    blocked: bool = False  # somebody's wish is not among them
    again_at: float = math.inf  # when waiting alone will have changed what can be done


class Planner:
    """One decision. Memory that is being given up is promised to the first that waits for it."""

    def __init__(self, rows: Iterable[Row], budget: Budget, limits: Limits, now: float) -> None:
        self._rows = list(rows)
        self._budget = budget
        self._limits = limits
        self._now = now
        self._plan = Plan()
        self._decided: set[str] = set()  # who comes or leaves by this decision
        self._placed: set[str] = set()
        self._promised_to: set[str] = set()
        self._free = budget.free
        self._soon = NOTHING  # free once what is being parked or unloaded is
        self._later = NOTHING  # and once what is draining has ended
        self._promised = NOTHING
        self._slots = limits.max_loads
        for row in self._rows:
            if row.work is Work.LOAD:
                self._slots -= 1
            elif row.work is Work.UNLOAD:
                self._soon = self._soon.plus(budget.held(row.name))
            elif row.work is Work.PARK:
                self._soon = self._soon.plus(budget.held(row.name).minus(row.parked or NOTHING).most(NOTHING))
            elif row.state is State.DRAINING:
                self._later = self._later.plus(budget.held(row.name))

    def plan(self) -> Plan:
        self._mend_excess()
        wanting = [row for row in self._rows if row.wants_memory(self._now)]
        for row in sorted(wanting, key=lambda row: (row.key, row.name)):
            self._place(row)
        self._plan.blocked = self._budget.excess != NOTHING or any(row.name not in self._placed for row in wanting)
        return self._plan

    def _mend_excess(self) -> None:
        """More was measured than had been reserved: somebody leaves, busy or not."""
        shortage = NOTHING.minus(self._free).minus(self._soon).minus(self._later)
        if not shortage.within(NOTHING):
            for patient in (True, False):
                if victims := choose(self._options(None, patient=patient), shortage, self._budget.total):
                    self._make_leave(victims)
                    return
            # What cannot be mended, because the rest is pinned, is left as it is.

    def _place(self, row: Row) -> None:
        if row.name in self._decided:
            return
        if not row.memory.within(self._limits.memory):
            self._placed.add(row.name)
            self._plan.steps.append((Step.GIVE_UP, row))
            return
        wakes = row.state is State.PARKED
        if not wakes and self._slots <= 0:
            return
        more = row.memory.minus(self._budget.held(row.name)).most(NOTHING)
        coming = self._free.plus(self._soon).minus(self._promised)
        if more.within(_positive(coming)) and more.within(_positive(self._free)):
            self._free = self._free.minus(more)
            self._slots -= not wakes
            self._decided.add(row.name)
            self._placed.add(row.name)
            self._plan.steps.append((Step.WAKE if wakes else Step.LOAD, row))
        elif more.within(_positive(coming)):
            self._slots -= not wakes  # it is a moment: nobody starts a long load just before it
            self._promise(row, more)
        else:
            self._wait_or_evict(row, more, coming)

    def _wait_or_evict(self, row: Row, more: Memory, coming: Memory) -> None:
        coming = coming.plus(self._later)
        shortage = more.minus(coming)
        impatient_at = row.key + self._limits.patience_s
        victims: list[Option] = []
        if not shortage.within(NOTHING):
            victims = choose(self._options(row, patient=True), shortage, self._budget.total)
            if not victims:
                if self._now < impatient_at:
                    self._plan.again_at = min(self._plan.again_at, impatient_at)
                    return  # what is free meanwhile is anybody's
                victims = choose(self._options(row, patient=False), shortage, self._budget.total)
                if not victims:
                    return
        self._make_leave(victims)
        self._promise(row, more)

    def _promise(self, row: Row, more: Memory) -> None:
        self._promised = self._promised.plus(more)
        self._promised_to.add(row.name)

    def _options(self, wanted_by: Row | None, *, patient: bool) -> list[Option]:
        options = []
        for row in self._rows:
            if row is wanted_by or row.pinned or row.work is not None or row.name in self._decided:
                continue
            if row.state not in (State.READY, State.PARKED) or (patient and (row.running or row.queue)):
                continue
            if row.name in self._promised_to:
                continue  # parked, and to be woken before
            if row.state is State.READY and wanted_by is not None:
                grown_up_at = row.ready_since + row.policy.min_residency
                if self._now < grown_up_at:
                    self._plan.again_at = min(self._plan.again_at, grown_up_at)
                    continue
            options += self._ways_out(row)
        return options

    def _ways_out(self, row: Row) -> list[Option]:
        held, rate = self._budget.held(row.name), row.frequency.rate(self._now)
        ways = [Option(row.name, True, held, rate, row.load_s.value)]
        if row.state is State.READY and not row.running and row.can_park and row.parked is not None:
            grown = row.parked.minus(held).most(NOTHING)
            if grown.within(_positive(self._free.minus(self._promised))):
                ways.append(Option(row.name, False, held.minus(row.parked), rate, row.wake_s.value))
        return ways

    def _make_leave(self, victims: Iterable[Option]) -> None:
        rows = {row.name: row for row in self._rows}
        for option in victims:
            row = rows[option.name]
            self._decided.add(row.name)
            self._plan.steps.append((Step.DRAIN if option.unload else Step.PARK, row))
            if not option.unload and row.parked is not None:  # parked and as it was, for a moment
                self._free = self._free.minus(row.parked.minus(self._budget.held(row.name)).most(NOTHING))
                self._soon = self._soon.plus(self._budget.held(row.name).minus(row.parked).most(NOTHING))
            elif row.running:
                self._later = self._later.plus(option.freed)
            else:
                self._soon = self._soon.plus(option.freed)


def _positive(memory: Memory) -> Memory:
    return memory.most(NOTHING)
