"""Drives the scheduler: the one place from which events come to it, and where its actions are carried out.

Requests wait here for their turn, operators and the catalog say here what they want, and the work on pipelines is
begun and its end reported here. Knows the clock and asyncio; neither Triton nor HTTP: who loads is a `Performer`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from gateway.lifecycle.budget import Memory
from gateway.lifecycle.scheduler import Scheduler
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
    Refuse,
    Start,
    State,
    Tick,
    Unload,
    Unloaded,
    Unpin,
    View,
    Wake,
    Woken,
)
from pipelines.errors import StageError

log = logging.getLogger(__name__)

_OPERATIONS: Mapping[str, Callable[[str, float], Event]] = {
    "load": AdminLoad,
    "unload": AdminUnload,
    "park": AdminPark,
    "pin": Pin,
    "unpin": Unpin,
}
OPERATIONS = tuple(_OPERATIONS)


@dataclass(frozen=True)
class Ready:
    """What a load came to: what it takes, where that was measured, and how long each phase took, in order."""

    memory: Memory | None = None
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds
    can_park: bool = True


class Performer(Protocol):
    """Does what the scheduler decides. Each ends, within a time of its own; a failure says why, in a sentence."""

    def check(self, pipeline: str) -> None:
        """Raises StageError for one that cannot be loaded as it is, and need not be tried."""

    async def load(self, pipeline: str) -> Ready:
        """Whatever is left of it is replaced. If it fails, nothing of it is left in memory."""

    async def unload(self, pipeline: str) -> None: ...

    async def park(self, pipeline: str) -> Memory | None: ...

    async def wake(self, pipeline: str) -> Memory | None: ...


class Elsewhere:
    """For models that somebody else loads and keeps: each is taken for loaded."""

    def check(self, pipeline: str) -> None:
        pass

    async def load(self, pipeline: str) -> Ready:
        return Ready()

    async def unload(self, pipeline: str) -> None:
        pass

    async def park(self, pipeline: str) -> Memory | None:
        return None

    async def wake(self, pipeline: str) -> Memory | None:
        return None


@dataclass(frozen=True)
class Worked:
    """What was last done to a pipeline. Times are time.monotonic."""

    verb: str  # load, wake, park, unload
    began: float
    ended: float
    phases: Mapping[str, float]  # of a load, seconds, in order


@dataclass(frozen=True)
class Progress:
    """How far a pipeline is from being ready."""

    stage: str  # waiting for its turn, or what is being done to it, or the phase of its load
    fraction: float
    eta_s: float


@dataclass
class Place:
    """One request's place in a pipeline: asked for by `Lifecycle.start`, given back by `finish`."""

    request: str
    pipeline: str
    places: int = 1
    deadline: float = math.inf  # time.monotonic
    batch: bool = False
    keep_alive: float | None = None  # seconds; None: the pipeline's
    asked: float = 0.0
    cold: bool = False  # its pipeline was not ready
    waited_s: float = 0.0
    worked: Worked | None = None  # what it waited for


class Lifecycle:
    """`open` within the loop it lives in, `close` at the end."""

    def __init__(
        self,
        limits: Limits,
        policies: Mapping[str, Policy],
        performer: Performer,
        on_state: Callable[[str, State, View], None] = lambda pipeline, before, view: None,
    ) -> None:
        """`on_state` hears of each pipeline whose state has changed, with the state before."""
        self._scheduler = Scheduler(limits, policies, time.monotonic())
        self._performer = performer
        self._on_state = on_state
        self._states: dict[str, State] = dict.fromkeys(policies, State.COLD)
        self._turns: dict[str, asyncio.Future[None]] = {}
        self._again: dict[str, asyncio.Future[None]] = {}  # turns of requests that have lost their place
        self._works: dict[str, tuple[Action, float, asyncio.Task[None]]] = {}  # and since when
        self._worked: dict[str, Worked] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._closed = False

    def open(self) -> None:
        """From here on what is pinned is loaded."""
        self._step(Tick(time.monotonic()))

    async def close(self) -> None:
        """Begins nothing more, and waits for no load."""
        self._closed = True
        if self._timer:
            self._timer.cancel()
        tasks = [task for _, _, task in self._works.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Requests.

    async def start(self, place: Place) -> None:
        """Returns when the request may start. Raises StageError where it may not, by its deadline at the latest."""
        state = self.state(place.pipeline)
        if state in (State.COLD, State.FAILED):
            self._performer.check(place.pipeline)
        place.asked, place.cold = time.monotonic(), state is not State.READY
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns[place.request] = turn
        self._step(
            Asked(
                place.request,
                place.pipeline,
                place.asked,
                place.deadline,
                place.batch,
                place.keep_alive,
                place.places,
            )
        )
        try:
            if turn.done():
                turn.result()
            else:
                await turn
        except asyncio.CancelledError:
            self._step(Gone(place.request, time.monotonic()))
            raise
        finally:
            self._turns.pop(place.request, None)
            del turn  # a refusal's traceback has this frame: with it that would be garbage for the collector, each time
            place.waited_s = time.monotonic() - place.asked
        if place.cold and (worked := self._worked.get(place.pipeline)) and worked.ended >= place.asked:
            place.worked = worked

    async def again(self, place: Place) -> None:
        """Of a request that has lost its place with its pipeline: until it has another. Any of its choices may ask."""
        if self._scheduler.runs(place.request):
            return
        if (turn := self._again.get(place.request)) is None:
            turn = self._again[place.request] = asyncio.ensure_future(self.start(place))
            turn.add_done_callback(lambda _: self._again.pop(place.request, None))
        await asyncio.shield(turn)

    def finish(self, place: Place) -> None:
        """It has ended, however. Of one that was lost with its pipeline nothing need be said, and may."""
        if turn := self._again.pop(place.request, None):
            turn.cancel()
        self._step(Finished(place.request, time.monotonic()))

    def waiting(self, pipeline: str) -> int:
        """How many requests wait for it."""
        return self._scheduler.waiting(pipeline)

    def state(self, pipeline: str) -> State:
        """COLD for what is not known, which `start` refuses."""
        return self._states.get(pipeline, State.COLD)

    # Whoever looks, operates, and changes the catalog.

    def views(self) -> list[View]:
        return self._scheduler.views(time.monotonic())

    def view(self, pipeline: str) -> View:
        return self._scheduler.view(pipeline, time.monotonic())

    def was_loaded(self, pipeline: str) -> bool:
        """Whether it has been, or could not be, since this gateway began."""
        return pipeline in self._worked

    def progress(self, pipeline: str) -> Progress:
        view = self.view(pipeline)
        if (work := self._works.get(pipeline)) is None:
            return Progress("waiting", 0.0, view.eta_s)
        action, began, _ = work
        elapsed = time.monotonic() - began
        stage = _phase(view.phases, elapsed) if isinstance(action, Load) else _verb(action)
        return Progress(stage, elapsed / (elapsed + view.eta_s) if elapsed else 0.0, view.eta_s)

    @property
    def memory(self) -> tuple[Memory, Memory]:
        """What is reserved, and what there is."""
        return self._scheduler.memory_used, self._scheduler.memory_total

    def operate(self, operation: str, pipeline: str) -> None:
        self._step(_OPERATIONS[operation](pipeline, time.monotonic()))

    def change(self, policies: Mapping[str, Policy], removed: frozenset[str] = frozenset()) -> None:
        """`policies` are the added and the changed."""
        self._step(CatalogChanged(time.monotonic(), policies, removed))

    # What becomes of pipelines.

    def lost(self, pipeline: str, reason: str) -> None:
        """It has died. If something is being done to it, that fails by itself, or is given up here."""
        if work := self._works.get(pipeline):
            action, _, task = work
            if isinstance(action, (Load, Unload)):
                return  # it finds out, and says so
            del self._works[pipeline]
            task.cancel()
        self._step(Lost(pipeline, time.monotonic(), reason))

    def _step(self, event: Event) -> None:
        works = False
        for action in self._scheduler.step(event):
            if isinstance(action, Start):
                if (turn := self._turns.get(action.request)) and not turn.done():
                    turn.set_result(None)
            elif isinstance(action, Refuse):
                if (turn := self._turns.get(action.request)) and not turn.done():
                    turn.set_exception(_refusal(action))
            else:
                works = True
                self._begin(action)
        if works or not isinstance(event, (Asked, Finished, Gone)):
            self._tell_states()
        self._arm()

    def _begin(self, action: Load | Park | Wake | Unload) -> None:
        if self._closed:
            return
        task = asyncio.get_running_loop().create_task(self._work(action), name=f"{_verb(action)} {action.pipeline}")
        self._works[action.pipeline] = action, time.monotonic(), task

    async def _work(self, action: Load | Park | Wake | Unload) -> None:
        pipeline = action.pipeline
        try:
            event = await self._perform(action)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            reason = error.message if isinstance(error, StageError) else f"{type(error).__name__}: {error}"
            log.error("%s could not %s: %s", pipeline, _verb(action), reason, extra={"pipeline": pipeline})
            now = time.monotonic()
            event = LoadFailed(pipeline, now, reason) if isinstance(action, Load) else Lost(pipeline, now, reason)
        _, began, _ = self._works.pop(pipeline)
        phases = event.phases if isinstance(event, Loaded) else {}
        self._worked[pipeline] = Worked(_verb(action), began, event.now, phases)
        self._step(event)

    async def _perform(self, action: Load | Park | Wake | Unload) -> Event:
        pipeline, performer = action.pipeline, self._performer
        if isinstance(action, Load):
            ready = await performer.load(pipeline)
            return Loaded(pipeline, time.monotonic(), ready.memory, ready.phases, ready.can_park)
        if isinstance(action, Park):
            parked = await performer.park(pipeline)
            return Parked(pipeline, time.monotonic(), parked)
        if isinstance(action, Wake):
            woken = await performer.wake(pipeline)
            return Woken(pipeline, time.monotonic(), woken)
        await performer.unload(pipeline)
        return Unloaded(pipeline, time.monotonic())

    def _tell_states(self) -> None:
        now = time.monotonic()
        before, self._states = self._states, {}
        for view in self._scheduler.views(now):
            self._states[view.pipeline] = view.state
            if (was := before.get(view.pipeline, State.COLD)) is not view.state:
                self._on_state(view.pipeline, was, view)

    def _arm(self) -> None:
        """A Tick when one is due: early is harmless, so an earlier one that is set is left."""
        due = self._scheduler.next_tick
        if self._closed or due is None or due >= self._timer_at:
            return
        if self._timer:
            self._timer.cancel()
        self._timer_at = due
        self._timer = asyncio.get_running_loop().call_later(max(0.0, due - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer, self._timer_at = None, math.inf
        self._step(Tick(time.monotonic()))


def _refusal(action: Refuse) -> StageError:
    return StageError(
        action.reason,
        code=action.code,
        param="model" if action.code == "model_not_found" else None,
        retry_after_s=action.retry_after_s,
    )


def _phase(usual: Mapping[str, float], elapsed: float) -> str:
    """Where a load is after so long, by how long each phase took the last time."""
    for phase, seconds in usual.items():
        elapsed -= seconds
        if elapsed < 0:
            return phase
    return next(reversed(list(usual)), "load")


def _verb(action: Action) -> str:
    return type(action).__name__.lower()
