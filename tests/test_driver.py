"""The lifecycle's driver: whoever waits is answered, whoever leaves is forgotten, and work ends in its report."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gateway.lifecycle.budget import Memory
from gateway.lifecycle.driver import Elsewhere, Lifecycle, Place, Ready
from gateway.lifecycle.states import Limits, Policy, State
from pipelines.errors import StageError

_NUMBERS = count()


class Loads:
    """A performer whose work ends when the test says so."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.gate = asyncio.Event()
        self.failure: Exception | None = None
        self.missing = ""

    def check(self, pipeline: str) -> None:
        if pipeline == self.missing:
            raise StageError("not here", code="model_not_pulled")

    async def load(self, pipeline: str) -> Ready:
        self.calls["load"] += 1
        await self.gate.wait()
        if self.failure:
            raise self.failure
        return Ready(Memory(ram=2), {"import": 0.5, "weights": 0.25})

    async def unload(self, pipeline: str) -> None:
        self.calls["unload"] += 1

    async def park(self, pipeline: str) -> Memory | None:
        self.calls["park"] += 1
        await self.gate.wait()
        return Memory(ram=1)

    async def wake(self, pipeline: str) -> Memory | None:
        self.calls["wake"] += 1
        return Memory(ram=2)


def policy(**changes: Any) -> Policy:
    return Policy(**{"memory": Memory(ram=3), "parked": Memory(ram=1), "keep_alive": 60.0, **changes})


def place(pipeline: str = "a", **changes: Any) -> Place:
    return Place(request=f"r{next(_NUMBERS)}", pipeline=pipeline, **changes)


def run(scenario: Callable[[Lifecycle, Loads], Awaitable[None]], *policies: Policy, **limits: Any) -> None:
    async def main() -> None:
        loads = Loads()
        named = dict(zip("abc", policies or (policy(),), strict=False))
        lifecycle = Lifecycle(Limits(**{"memory": Memory(ram=10), **limits}), named, loads)
        lifecycle.open()
        try:
            await asyncio.wait_for(scenario(lifecycle, loads), 20)
        finally:
            await lifecycle.close()

    asyncio.run(main())


def test_a_thousand_who_ask_at_once_cause_one_load() -> None:
    async def scenario(lifecycle: Lifecycle, loads: Loads) -> None:
        places = [place() for _ in range(1000)]
        turns = [asyncio.create_task(lifecycle.start(each)) for each in places]
        await asyncio.sleep(0)
        turns[0].cancel()  # whoever came first: the load is not only for it
        await asyncio.sleep(0)
        assert lifecycle.waiting("a") == 999
        loads.gate.set()
        await asyncio.gather(*turns[1:])
        assert (loads.calls["load"], lifecycle.state("a")) == (1, State.READY)
        assert all(each.cold and each.worked and each.worked.verb == "load" for each in places[1:])
        assert lifecycle.view("a").running == 999
        for each in places:
            lifecycle.finish(each)
        assert lifecycle.view("a").running == 0

    run(scenario, policy(max_concurrency=1000))


def test_one_that_is_ready_is_started_at_once() -> None:
    async def scenario(lifecycle: Lifecycle, loads: Loads) -> None:
        loads.gate.set()
        await lifecycle.start(place())
        second = place()
        await lifecycle.start(second)
        assert not second.cold
        assert second.worked is None

    run(scenario)


def test_a_load_that_fails_is_told_with_its_reason_and_when_to_come_back() -> None:
    async def scenario(lifecycle: Lifecycle, loads: Loads) -> None:
        loads.failure = StageError("the weights are corrupt", code="unavailable")
        loads.gate.set()
        with pytest.raises(StageError, match="the weights are corrupt") as raised:
            await lifecycle.start(place())
        assert (raised.value.code, lifecycle.state("a")) == ("unavailable", State.FAILED)
        assert raised.value.retry_after_s
        with pytest.raises(StageError, match="the weights are corrupt"):
            await lifecycle.start(place())  # at once, without another try
        assert loads.calls["load"] == 1

    run(scenario)


def test_a_refusal_leaves_nothing_for_the_collector() -> None:
    """Its traceback held the future that held it: under tenfold overload the collector ran 14 times a second."""

    async def scenario(lifecycle: Lifecycle, loads: Loads) -> None:
        loads.gate.set()
        await lifecycle.start(place())
        started = 0
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                with contextlib.suppress(StageError):
                    await lifecycle.start(place())
                    started += 1
            assert (started, gc.collect()) == (0, 0)
        finally:
            gc.enable()

    run(scenario, policy(max_concurrency=1, max_queue=0))


def test_a_deadline_is_kept_while_it_is_loaded() -> None:
    async def scenario(lifecycle: Lifecycle, loads: Loads) -> None:
        with pytest.raises(StageError, match="being loaded") as raised:
            await lifecycle.start(place(deadline=time.monotonic() + 0.05))
        assert raised.value.code == "unavailable"
        assert raised.value.retry_after_s is not None
        assert lifecycle.waiting("a") == 0
        assert lifecycle.state("a") is State.LOADING  # for the next

    run(scenario)


def test_an_unknown_pipeline_and_one_whose_weights_are_missing_are_refused() -> None:
    async def scenario(lifecycle: Lifecycle, loads: Loads) -> None:
        loads.missing = "a"
        for name, code in (("nobody", "model_not_found"), ("a", "model_not_pulled")):
            with pytest.raises(StageError) as raised:
                await lifecycle.start(place(name))
            assert raised.value.code == code
        assert (loads.calls["load"], lifecycle.state("a")) == (0, State.COLD)

    run(scenario)


def test_idle_it_is_parked_and_then_unloaded_and_wakes() -> None:
    async def scenario(lifecycle: Lifecycle, loads: Loads) -> None:
        loads.gate.set()
        first = place()
        await lifecycle.start(first)
        lifecycle.finish(first)
        await until(lambda: lifecycle.state("a") is State.PARKED and lifecycle.view("a").work is None)
        assert lifecycle.memory[0] == Memory(ram=1)
        second = place()
        await lifecycle.start(second)
        assert second.worked
        assert (second.worked.verb, loads.calls["load"]) == ("wake", 1)
        lifecycle.finish(second)
        await until(lambda: lifecycle.state("a") is State.COLD)
        assert (loads.calls["park"], loads.calls["unload"], lifecycle.memory[0]) == (2, 1, Memory())

    run(scenario, policy(keep_alive=0.0, keep_parked=0.1))


def test_one_that_dies_is_loaded_again_and_what_waits_is_served() -> None:
    async def scenario(lifecycle: Lifecycle, loads: Loads) -> None:
        loads.gate.set()
        lost = place()
        await lifecycle.start(lost)
        loads.gate.clear()
        lifecycle.lost("a", "its stub died")
        assert lifecycle.state("a") is State.LOADING
        again = asyncio.create_task(lifecycle.start(lost))  # under the same id
        await asyncio.sleep(0)
        loads.gate.set()
        await again
        assert lifecycle.view("a").running == 1
        lifecycle.finish(lost)
        lifecycle.finish(lost)  # twice is harmless
        assert lifecycle.view("a").running == 0

    run(scenario)


def test_one_that_dies_while_it_is_parked_away_is_not_waited_for() -> None:
    async def scenario(lifecycle: Lifecycle, loads: Loads) -> None:
        loads.gate.set()
        first = place()
        await lifecycle.start(first)
        loads.gate.clear()
        lifecycle.operate("park", "a")
        lifecycle.finish(first)
        await until(lambda: loads.calls["park"] == 1)
        lifecycle.lost("a", "its stub died")  # park would never have returned
        assert lifecycle.state("a") is State.FAILED

    run(scenario)


def test_progress_follows_the_phases_of_the_last_load() -> None:
    async def scenario(lifecycle: Lifecycle, loads: Loads) -> None:
        loads.gate.set()
        first = place()
        await lifecycle.start(first)
        lifecycle.finish(first)
        lifecycle.operate("unload", "a")
        await until(lambda: lifecycle.state("a") is State.COLD)
        loads.gate.clear()
        turn = asyncio.create_task(lifecycle.start(place()))
        await asyncio.sleep(0.01)
        progress = lifecycle.progress("a")
        assert (progress.stage, 0 < progress.fraction < 1) == ("import", True)
        loads.gate.set()
        await turn

    run(scenario)


def test_whoever_waits_behind_a_large_request_goes_on_when_it_leaves() -> None:
    async def scenario(lifecycle: Lifecycle, loads: Loads) -> None:
        loads.gate.set()
        await lifecycle.start(place(places=2))
        large = asyncio.create_task(lifecycle.start(place(places=3)))
        await asyncio.sleep(0)
        small = asyncio.create_task(lifecycle.start(place()))
        await asyncio.sleep(0)
        assert lifecycle.waiting("a") == 2  # the small one does not overtake
        large.cancel()
        await small
        assert lifecycle.waiting("a") == 0

    run(scenario, policy(max_concurrency=3))


actions = st.lists(
    st.tuples(st.sampled_from(["start", "finish", "cancel", "lost", "yield"]), st.integers(0, 9), st.integers(1, 4)),
    max_size=60,
)


@given(actions)
@hypothesis_settings(max_examples=150, deadline=None)
def test_no_place_is_ever_lost(actions: list[tuple[str, int, int]]) -> None:
    """Whatever starts, ends, is cancelled and dies, in whatever order: the limit holds, and nobody waits for ever."""

    async def main() -> None:
        lifecycle = Lifecycle(Limits(memory=Memory(ram=10)), {"a": policy(max_concurrency=3, max_queue=3)}, Elsewhere())
        lifecycle.open()
        inside: dict[asyncio.Event, Place] = {}
        ends: dict[asyncio.Task[None], asyncio.Event] = {}

        async def one(end: asyncio.Event, places: int) -> None:
            mine = place(places=places)
            await lifecycle.start(mine)
            inside[end] = mine
            try:
                await end.wait()
            finally:
                del inside[end]
                lifecycle.finish(mine)

        for action, which, places in actions:
            tasks: list[asyncio.Task[None]] = list(ends)
            if action == "start":
                end = asyncio.Event()
                ends[asyncio.create_task(one(end, places))] = end
            elif action == "yield":
                await asyncio.sleep(0)
            elif action == "lost":
                lifecycle.lost("a", "it died")
            elif tasks and action == "cancel":
                tasks[which % len(tasks)].cancel()
            elif tasks:
                ends[tasks[which % len(tasks)]].set()
            view = lifecycle.view("a")
            assert view.waiting <= 6
        for end in ends.values():
            end.set()
        for result in await asyncio.wait_for(asyncio.gather(*ends, return_exceptions=True), 10):
            assert result is None or isinstance(result, (asyncio.CancelledError, StageError))
        view = lifecycle.view("a")
        assert (view.running, view.waiting, inside) == (0, 0, {})
        await lifecycle.close()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)
