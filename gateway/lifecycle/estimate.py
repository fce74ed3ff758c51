"""How long it takes: what a client is told of when to come back, and people of a pipeline.

Reads rows, changes nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

from gateway.lifecycle.budget import Budget, Memory
from gateway.lifecycle.rows import Row
from gateway.lifecycle.states import Limits, State, View, Work

NEVER_S = 3600.0  # of what only an operator can mend
_OVERDUE = 0.1  # of its usual time is what a work that has taken all of it is thought to take yet


def ready_in(row: Row, rows: Iterable[Row], limits: Limits, now: float) -> float:
    """Seconds, from measured load times: its own, those under way, and those whose turn is before."""
    if row.state is State.READY:
        return 0.0
    if row.work is Work.LOAD:
        return _left(row, row.load_s.value, now)
    if row.work is Work.WAKE:
        return _left(row, row.wake_s.value, now)
    if row.state is State.PARKED and not row.leaves:
        return row.wake_s.value
    backoff = max(0.0, row.retry_at - now) if row.state is State.FAILED else 0.0
    # When each of the places to load in is free: the next to load takes the first of them.
    free = [_left(other, other.load_s.value, now) for other in rows if other.work is Work.LOAD]
    free += [0.0] * (limits.max_loads - len(free))
    heapq.heapify(free)
    before = [other for other in rows if other is not row and _loads_before(other, row, now)]
    for other in sorted(before, key=lambda other: (other.key, other.name)):
        heapq.heapreplace(free, free[0] + other.load_s.value)
    return max(backoff, free[0]) + row.load_s.value


def _loads_before(other: Row, row: Row, now: float) -> bool:
    return (
        other.state is not State.PARKED
        and other.wants_memory(now)
        and (other.key, other.name) < (min(row.key, now), row.name)
    )


def _left(row: Row, usually_s: float, now: float) -> float:
    return max(row.work_since + usually_s - now, usually_s * _OVERDUE)


def overload(row: Row, eta_s: float) -> tuple[str, float]:
    """What a request is told for which there is no place even to wait."""
    rounds = math.ceil((len(row.queue) + 1) / max(1, row.policy.max_concurrency))
    reason = f"'{row.name}' is at its limit: {len(row.running)} requests run and {len(row.queue)} wait."
    return reason, eta_s + rounds * row.service_s.value


def lateness(row: Row, budget: Budget, eta_s: float) -> tuple[str, str, float | None]:
    """Code, reason and seconds to wait, for a request whose deadline has come."""
    if row.state is State.READY:
        reason = f"The request's time was over before '{row.name}' had a place for it."
        return "timeout", reason, row.service_s.value
    reason = f"'{row.name}' was not ready in the time the request gave itself"
    if row.work is not None:
        doing = {Work.LOAD: "loaded", Work.WAKE: "woken", Work.PARK: "parked", Work.UNLOAD: "unloaded"}[row.work]
        return "unavailable", f"{reason}: it is being {doing}.", eta_s
    if row.state is State.DRAINING:
        return "unavailable", f"{reason}: its last requests end, and then it is loaded anew.", eta_s
    if not row.memory.minus(budget.held(row.name)).most(Memory()).within(budget.free.most(Memory())):
        needs = f"it needs {row.memory}, and the models in memory leave {budget.free.most(Memory())}"
        return "unavailable", f"{reason}: {needs}.", eta_s
    return "unavailable", f"{reason}: it waits for its turn to be loaded.", eta_s


def view(row: Row, held: Memory, eta_s: float, now: float) -> View:
    idle = not row.running and not row.queue and row.work is None and not row.pinned
    until: float | None = None
    if idle and row.state is State.READY:
        until = row.keep_until
    elif idle and row.state is State.PARKED:
        until = row.parked_since + row.policy.keep_parked
    return View(
        pipeline=row.name,
        state=row.state,
        work=row.work,
        pinned=row.pinned,
        running=len(row.running),
        waiting=len(row.queue),
        memory=held,
        needs=row.memory,
        load_s=row.load_s.value,
        wake_s=row.wake_s.value,
        eta_s=eta_s,
        idle_until=until if until is None or until < math.inf else None,
        failures=row.failures,
        reason=row.reason,
        retry_at=row.retry_at if row.state is State.FAILED else None,
        phases=row.phases,
    )
