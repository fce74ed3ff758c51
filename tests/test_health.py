"""When a gateway is ready: what is only unloaded is no fault, what is loaded from the start is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from gateway.backend import Stream, Submission
from gateway.health import Health
from gateway.lifecycle.budget import Memory
from gateway.lifecycle.driver import Lifecycle
from gateway.lifecycle.states import Limits, Policy, State
from pipelines.errors import StageError
from pipelines.pipeline import Pipeline
from tests.test_driver import Loads, place, until


class Served:
    def __init__(self) -> None:
        self.silent: set[str] = set()

    def pipelines(self) -> Mapping[str, Pipeline]:
        return {name: Pipeline(name=name, source="path:none") for name in ("a", "b")}

    def ready(self, pipeline: str) -> bool:
        return pipeline not in self.silent

    async def submit(self, submission: Submission) -> Stream:
        raise NotImplementedError

    async def recording(self, pipeline: str, span: str) -> bytes:
        return b""


def run(scenario: Callable[[Lifecycle, Loads, Health, Served], Awaitable[None]]) -> None:
    async def main() -> None:
        loads, served = Loads(), Served()
        policies = {name: Policy(Memory(ram=3), Memory(ram=1), keep_alive=60.0) for name in ("a", "b")}
        lifecycle = Lifecycle(Limits(Memory(ram=10)), policies, loads)
        lifecycle.open()
        try:
            await asyncio.wait_for(scenario(lifecycle, loads, Health(lifecycle, served, ["a"]), served), 20)
        finally:
            await lifecycle.close()

    asyncio.run(main())


def test_what_is_loaded_from_the_start_is_waited_for_and_may_then_leave() -> None:
    """Before, one that had left before anybody asked was never well again."""

    async def scenario(lifecycle: Lifecycle, loads: Loads, health: Health, served: Served) -> None:
        assert (health.ready(), health.not_ready()) == (False, ["a"])
        lifecycle.operate("load", "a")
        loads.gate.set()
        await until(lambda: lifecycle.state("a") is State.READY)
        lifecycle.operate("unload", "a")
        await until(lambda: lifecycle.state("a") is State.COLD)
        assert (health.ready(), health.not_ready(), health.answers("a")) == (True, [], True)

    run(scenario)


def test_one_that_somebody_asked_for_and_that_fails_is_told_of_and_no_more() -> None:
    async def scenario(lifecycle: Lifecycle, loads: Loads, health: Health, served: Served) -> None:
        loads.gate.set()
        await lifecycle.start(place("a"))
        loads.failure = StageError("corrupt", code="unavailable")
        await asyncio.gather(lifecycle.start(place("b")), return_exceptions=True)
        assert (health.ready(), health.not_ready(), health.answers("b")) == (True, ["b"], False)
        served.silent.add("a")
        assert not health.ready()
        served.silent.clear()
        health.stopping = True
        assert (health.ready(), health.answers("a")) == (False, False)

    run(scenario)
