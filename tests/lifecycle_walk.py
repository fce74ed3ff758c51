"""A random walk through the lifecycle: a driver that does whatever a real one might, and watches what must never be.

`python -m tests.lifecycle_walk --transitions 1000000 --seed 0`. The driver keeps its own account of everything, from
the actions alone, and asks the scheduler for nothing but `next_tick` and `view`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from gateway.lifecycle.budget import NOTHING, Memory
from gateway.lifecycle.scheduler import Scheduler
from gateway.lifecycle.states import (
    AdminLoad,
    AdminPark,
    AdminUnload,
    Asked,
    CatalogChanged,
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
    Refuse,
    Start,
    Tick,
    Unload,
    Unloaded,
    Unpin,
    Wake,
    Why,
    Woken,
)

NAMES = ["a", "b", "c", "d", "e", "f"]
PERIOD = 2000  # transitions with one set of limits and pipelines, at the end of which all must come to rest


@dataclass
class Pipeline:
    """What the driver knows of one: what is in memory, and what is being done."""

    policy: Policy
    state: str = "cold"  # cold, ready, parked
    work: object = None
    holds: Memory = NOTHING
    expects: Memory = NOTHING  # what a load is expected to take
    expects_parked: Memory | None = None
    measures: tuple = ()
    ready_since: float = 0.0
    residency: float = 0.0  # the least that it was promised since
    failures_until: float = 0.0
    pinned: bool = False
    removed: bool = False
    running: dict = field(default_factory=dict)
    waiting: dict = field(default_factory=dict)


class Walk:
    """One set of limits and pipelines."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = self.random.uniform(0, 1000)
        total = Memory(self.random.randint(8, 30), self.random.choice([0, 0, 20]))
        self.limits = Limits(
            total,
            max_loads=self.random.choice([1, 1, 2]),
            max_keep_alive=50,
            batch_delay_s=self.random.choice([5, 30]),
            patience_s=self.random.choice([3, 20]),
            backoff_s=1,
            max_backoff_s=20,
            stable_s=30,
            half_life_s=60,
        )
        self.pipelines = {name: self.new() for name in NAMES[: self.random.randint(1, 5)]}
        self.scheduler = Scheduler(self.limits, {n: p.policy for n, p in self.pipelines.items()}, self.now)
        self.trouble = self.random.choice([0.1, 1])  # how often things fail, and operators meddle
        self.number = 0
        self.edges: Counter = Counter()
        self.transitions = 0
        self.refusals: Counter = Counter()
        self.starts = 0
        self.overcommitted = False  # by a measurement, since when nothing may be added
        self.overcommitted_at = float("-inf")  # last

    # A world.

    def memory(self, most: int) -> Memory:
        gpu = self.random.randint(0, most) if self.limits.memory.gpu else 0
        return Memory(self.random.randint(1, most), gpu)

    def policy(self) -> Policy:
        pick = self.random.choice
        return Policy(
            self.memory(pick([5, 10, 33])),
            parked=pick([None, self.memory(2), self.memory(4)]),
            load_s=self.random.uniform(1, 20),
            wake_s=self.random.uniform(0.1, 1),
            pin=self.random.random() < 0.1,
            keep_alive=pick([0, 5, 20, 1e9]),
            keep_parked=pick([0, 10, 30]),
            max_concurrency=pick([1, 2, 4]),
            max_queue=pick([0, 1, 5]),
            priority=pick([-2, 0, 0, 1]),
            min_residency=pick([0, 2, 10]),
            version=str(self.random.randint(0, 3)),
        )

    def new(self) -> Pipeline:
        policy = self.policy()
        return Pipeline(
            policy,
            expects=policy.memory,
            expects_parked=policy.parked,
            measures=(policy.version, policy.memory, policy.parked),
            pinned=policy.pin,
        )

    # One transition.

    def send(self, event: object) -> None:
        self.transitions += 1
        before = {name: self.status(name) for name in self.pipelines}
        actions = self.scheduler.step(event)
        for action in actions:
            self.act(action, event)
        self.check()
        for name, was in before.items():
            if (now := self.status(name)) != was:
                self.edges[was, type(event).__name__, now] += 1

    def status(self, name: str) -> str:
        row = self.scheduler._rows.get(name)
        if row is None:
            return "gone"
        return row.state.value + (f"+{row.work.value}" if row.work and row.work.value + "ing" != "loading" else "")

    def act(self, action: object, event: object) -> None:
        pipeline = self.pipelines.get(action.pipeline)
        if isinstance(action, Start):
            deadline, places = pipeline.waiting.pop(action.request)
            assert pipeline.state == "ready", "a start of what is not ready"
            assert pipeline.work is None, "a start while it is worked on"
            assert deadline > self.now, "a start past the deadline"
            used = sum(pipeline.running.values())
            assert not used or used + places <= pipeline.policy.max_concurrency, "more at once than it allows"
            pipeline.running[action.request] = places
            self.starts += 1
        elif isinstance(action, Refuse):
            self.refusals[action.code] += 1
            assert action.reason
            if action.code != "model_not_found":
                pipeline.waiting.pop(action.request)
                assert action.retry_after_s is not None
                assert action.retry_after_s >= 0
            elif pipeline is not None:
                pipeline.waiting.pop(action.request, None)
        else:
            assert pipeline.work is None, f"{action} while {pipeline.work} is under way"
            self.work(pipeline, action, event)
            pipeline.work = action

    def work(self, pipeline: Pipeline, action: object, event: object) -> None:
        if isinstance(action, Load):
            assert pipeline.state == "cold"
            assert not pipeline.removed
            assert self.now >= pipeline.failures_until, "a load within its backoff"
            if not isinstance(event, Lost):
                loads = sum(isinstance(other.work, Load) for other in self.pipelines.values())
                assert loads < self.limits.max_loads, "more loads at once than allowed"
            self.hold(pipeline, pipeline.expects)
        elif isinstance(action, Wake):
            assert pipeline.state == "parked"
            self.hold(pipeline, pipeline.holds.most(pipeline.expects))
        else:
            assert not pipeline.running, f"{action} with requests in flight"
            if action.why is Why.EVICTED:
                assert not pipeline.pinned, "a pinned one is evicted"
                grown_up = pipeline.ready_since + pipeline.residency <= self.now
                excused = self.overcommitted or self.overcommitted_at >= pipeline.ready_since
                assert pipeline.state == "parked" or grown_up or excused, "evicted too young"
            if isinstance(action, Park):
                assert pipeline.state == "ready"
                self.hold(pipeline, pipeline.holds.most(pipeline.expects_parked))
            else:
                assert pipeline.state in ("ready", "parked")
            pipeline.state = "leaving"

    def hold(self, pipeline: Pipeline, memory: Memory) -> None:
        more = memory.minus(pipeline.holds).most(NOTHING)
        pipeline.holds = memory
        used = self.used()
        for kind in (0, 1):
            assert not more[kind] or used[kind] <= self.limits.memory[kind], f"{used} of {self.limits.memory} held"

    def used(self) -> Memory:
        used = NOTHING
        for pipeline in self.pipelines.values():
            used = used.plus(pipeline.holds)
        return used

    def check(self) -> None:
        tick = self.scheduler.next_tick
        assert self.scheduler.memory_used == self.used(), "the accounts differ"
        self.overcommitted = self.overcommitted and not self.used().within(self.limits.memory)
        if self.overcommitted:
            self.overcommitted_at = self.now
        assert self.overcommitted or self.used().within(self.limits.memory), "over budget without a measurement"
        for name, pipeline in self.pipelines.items():
            if not pipeline.waiting:
                continue
            first = min(deadline for deadline, _ in pipeline.waiting.values())
            assert first > self.now, "a waiter was not answered by its deadline"
            assert tick is not None
            assert tick <= first, "nobody will look when its deadline comes"
            if pipeline.state == "ready" and pipeline.work is None and not self.drains(name):
                assert pipeline.running, "waiting for a place, and all are free"
        if self.transitions % 8 == 0:
            self.scheduler._residency.plan_due = True
            assert self.scheduler.step(Tick(self.now)) == [], "something had been left undone"
            self.check_idle_hands()

    def drains(self, name: str) -> bool:
        return self.scheduler._rows[name].state.value == "draining"

    def check_idle_hands(self) -> None:
        """With nothing under way and nothing running, whoever waits does so for the pinned and the young alone."""
        if any(p.work is not None or p.running for p in self.pipelines.values()):
            return
        for pipeline in self.pipelines.values():
            if not pipeline.waiting:
                continue
            stays = NOTHING
            for other in self.pipelines.values():
                young = other.state == "ready" and other.ready_since + other.policy.min_residency > self.now
                if other is not pipeline and (other.pinned or young or other.waiting):
                    stays = stays.plus(other.holds)
            need = pipeline.expects.most(pipeline.holds) if pipeline.state == "parked" else pipeline.expects
            assert not stays.plus(need).within(self.limits.memory), "it could be loaded, and is not"

    # What may happen.

    def any_event(self) -> None:
        tick = self.scheduler.next_tick
        step = self.random.choice([0, 0, 0.01, 0.3, 2, 10]) * self.random.random()
        if tick is not None and tick <= self.now + step:
            self.now = max(self.now, tick)
            self.send(Tick(self.now))
            return
        self.now += step
        roll = self.random.random()
        if roll < 0.40:
            self.ask()
        elif roll < 0.62:
            self.end_request()
        elif roll < 0.90:
            self.end_work()
        elif roll < 0.93:
            self.send(Tick(self.now))
        elif self.random.random() > self.trouble:
            self.end_work()
        elif roll < 0.945:
            self.die()
        elif roll < 0.98:
            self.admin()
        else:
            self.catalog()

    def ask(self) -> None:
        name = self.random.choice([*self.pipelines, *self.pipelines, "unknown"])
        self.number += 1
        request = f"r{self.number}"
        deadline = self.now + self.random.choice([0, 0.5, 5, 40, 300])
        places = self.random.choice([1, 1, 1, 2, 5])
        if pipeline := self.pipelines.get(name):
            pipeline.waiting[request] = (deadline, places)
        keep_alive = self.random.choice([None, None, 0, 3, 1000])
        self.send(Asked(request, name, self.now, deadline, self.random.random() < 0.3, keep_alive, places))

    def end_request(self) -> None:
        requests = [(p, r) for p in self.pipelines.values() for r in (*p.running, *p.waiting)]
        if not requests:
            self.send(Gone("nobody", self.now))
            return
        pipeline, request = self.random.choice(requests)
        ran = pipeline.running.pop(request, None)
        pipeline.waiting.pop(request, None)
        self.send(Finished(request, self.now) if ran and self.random.random() < 0.9 else Gone(request, self.now))

    def end_work(self, fails: float | None = None) -> None:
        working = [name for name, pipeline in self.pipelines.items() if pipeline.work is not None]
        if not working:
            self.send(Tick(self.now))
            return
        name = self.random.choice(working)
        pipeline = self.pipelines[name]
        work, pipeline.work = pipeline.work, None
        if self.random.random() < (self.trouble * 0.12 if fails is None else fails):
            self.fail(name, pipeline, LoadFailed if isinstance(work, Load) else Lost)
        elif isinstance(work, Unload):
            self.gone_cold(pipeline)
            self.send(Unloaded(name, self.now))
            self.forget(name)
        elif isinstance(work, Park):
            pipeline.state = "parked"
            pipeline.holds = pipeline.expects_parked = self.measured(pipeline.expects_parked)
            self.send(Parked(name, self.now, pipeline.holds))
        else:
            pipeline.state, pipeline.ready_since = "ready", self.now
            pipeline.residency = pipeline.policy.min_residency
            pipeline.holds = pipeline.expects = self.measured(pipeline.expects)
            self.send((Loaded if isinstance(work, Load) else Woken)(name, self.now, pipeline.holds))

    def measured(self, expected: Memory) -> Memory:
        if self.random.random() < 0.9:
            return expected
        self.overcommitted, self.overcommitted_at = True, self.now
        return Memory(max(0, expected.ram + self.random.randint(-2, 2)), expected.gpu)

    def fail(self, name: str, pipeline: Pipeline, event: type) -> None:
        was = pipeline.state
        pipeline.running.clear()
        self.gone_cold(pipeline)
        if was != "leaving" and not pipeline.removed:
            pipeline.failures_until = 0.0
        self.send(event(name, self.now, "it broke"))
        self.forget(name)
        if name in self.pipelines and pipeline.work is None and self.status(name) == "failed":
            pipeline.failures_until = self.now + self.limits.backoff_s
            assert self.scheduler.view(name, self.now).retry_at >= pipeline.failures_until
            assert not pipeline.waiting

    def gone_cold(self, pipeline: Pipeline) -> None:
        pipeline.state, pipeline.work, pipeline.holds = "cold", None, NOTHING
        self.measure_anew(pipeline)

    def measure_anew(self, pipeline: Pipeline) -> None:
        policy = pipeline.policy
        measures = (policy.version, policy.memory, policy.parked)
        if pipeline.state == "cold" and pipeline.work is None and pipeline.measures != measures:
            pipeline.measures = measures
            pipeline.expects, pipeline.expects_parked = policy.memory, policy.parked

    def forget(self, name: str) -> None:
        if self.pipelines[name].removed and self.status(name) == "gone":
            del self.pipelines[name]

    def die(self) -> None:
        name = self.random.choice([*self.pipelines, "unknown"])
        pipeline = self.pipelines.get(name)
        if pipeline is None or (pipeline.state == "cold" and pipeline.work is None):
            self.send(Lost(name, self.now, "it died"))
        else:
            self.fail(name, pipeline, Lost)

    def admin(self) -> None:
        name = self.random.choice([*self.pipelines, "unknown"])
        pipeline = self.pipelines.get(name)
        event = self.random.choice([Pin, Unpin, Unpin, AdminLoad, AdminUnload, AdminPark])
        if pipeline is not None and not pipeline.removed:
            if event in (Pin, Unpin, AdminUnload):
                pipeline.pinned = event is Pin
            if event is AdminLoad:
                pipeline.failures_until = 0.0
        self.send(event(name, self.now))

    def catalog(self) -> None:
        name = self.random.choice(NAMES)
        pipeline = self.pipelines.get(name)
        if pipeline is not None and self.random.random() < 0.3:
            pipeline.removed, pipeline.pinned = True, False
            self.send(CatalogChanged(self.now, removed=frozenset([name])))
            self.forget(name)
            return
        if pipeline is None:
            pipeline = self.pipelines[name] = self.new()
        else:
            policy = self.policy()
            if policy.pin != pipeline.policy.pin or pipeline.removed:
                pipeline.pinned = policy.pin
            pipeline.policy, pipeline.removed, pipeline.failures_until = policy, False, 0.0
            pipeline.residency = min(pipeline.residency, policy.min_residency)
            self.measure_anew(pipeline)
        self.send(CatalogChanged(self.now, {name: pipeline.policy}))

    # The end.

    def rest(self) -> None:
        """Nobody asks any more and nothing is pinned: everything is answered, and nothing stays in memory."""
        for name in list(self.pipelines):
            self.pipelines[name].pinned = False
            self.send(Unpin(name, self.now))
        for _ in range(2000):
            if any(pipeline.work is not None for pipeline in self.pipelines.values()):
                self.end_work(fails=0)
            elif any(pipeline.running for pipeline in self.pipelines.values()):
                self.end_request()
            elif (tick := self.scheduler.next_tick) is not None:
                self.now = max(self.now, tick)
                self.send(Tick(self.now))
            else:
                break
        else:
            raise AssertionError("it does not come to rest")
        for pipeline in self.pipelines.values():
            assert not pipeline.waiting, "a waiter is stuck"
            assert pipeline.state == "cold" or pipeline.policy.keep_alive == float("inf")
        assert self.used() == NOTHING


def walk(transitions: int, seed: int) -> tuple[Counter, Counter, int]:
    """Edges, refusals by code, and requests started; an AssertionError says where it was."""
    edges: Counter = Counter()
    refusals: Counter = Counter()
    done = starts = number = 0
    while done < transitions:
        world = Walk(seed * 1_000_003 + number)
        try:
            for _ in range(min(PERIOD, transitions - done)):
                world.any_event()
            world.rest()
        except Exception as error:
            raise AssertionError(f"seed {seed}, world {number}, transition {world.transitions}: {error!r}") from error
        edges += world.edges
        refusals += world.refusals
        starts += world.starts
        done += world.transitions
        number += 1
    return edges, refusals, starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transitions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    edges, refusals, starts = walk(arguments.transitions, arguments.seed)
    for (was, event, now), count in sorted(edges.items()):
        print(f"{count:9,}  {was:16} {event:14} {now}")
    print(f"{len(edges)} edges; {starts:,} started; refused: {dict(refusals)}")
    print(f"{arguments.transitions:,} transitions in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
