"""Pipelines into Triton's memory and out of it (`gateway.lifecycle.driver.Performer`), by Triton's model control.

A load replaces whatever is left of the pipeline and keeps what stands: so it is also how one is mended of which a
stage has died. Decides nothing: when, and what leaves for it, is the scheduler's. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from gateway.control import Away, Control
from gateway.guard import Guard
from gateway.lane import Lanes
from gateway.lifecycle.budget import Memory
from gateway.lifecycle.driver import Ready
from gateway.supervisor import Supervisor
from gateway.triton import Stub
from gateway.watchdog import Stall
from gateway.within import within
from observability import metrics
from pipelines.contracts import ENSEMBLE, MODELS, model_name
from pipelines.errors import StageError
from pipelines.pipeline import Pipeline
from pipelines.repository import render
from pipelines.sources import is_pulled

log = logging.getLogger(__name__)

LOAD_S = 600.0  # of a model of many gigabytes, from a slow disk
_ANSWER_S = 10.0  # for generate to say what it is
_OPERATE_S = 120.0  # to park, or to wake
_GONE_S = 20.0  # for the stubs of models that are unloaded to end
_WATCH_S = 0.1
_QUIET_S = 0.2  # for calls that are being made to be under way
_ORCHESTRATOR = "orchestrator"

T = TypeVar("T")


class Loader:
    def __init__(
        self,
        control: Control,
        supervisor: Supervisor,
        lanes: Lanes,
        pipelines: Mapping[str, Pipeline],
        repository: Path,
        guard: Guard,
        on_lost: Callable[[str, str], None],
    ) -> None:
        """`pipelines` may change. `on_lost` hears of a pipeline at rest that has died, and why."""
        self._control = control
        self._supervisor = supervisor
        self._lanes = lanes
        self._pipelines = pipelines
        self._repository = repository
        self._on_lost = on_lost
        self._up = asyncio.Event()
        self._loaded: set[str] = set()
        self._broken: dict[str, set[str]] = {}  # by pipeline, the models to be replaced
        self._hung: dict[tuple[str, str], str] = {}  # by pipeline and stage, how those were that are being ended
        lanes.on_unhealthy = self.unhealthy
        guard.end = self.hangs

    @property
    def triton_is_there(self) -> bool:
        return self._up.is_set()

    # What the scheduler wants (`Performer`).

    def check(self, pipeline: str) -> None:
        declared = self._pipelines.get(pipeline)
        if declared is not None and not is_pulled(declared):
            message = f"The weights of '{pipeline}' are not on this server: `triptych pull {pipeline}` fetches them."
            raise StageError(message, code="model_not_pulled", param="model")

    async def load(self, pipeline: str) -> Ready:
        self.check(pipeline)
        declared = self._pipelines.get(pipeline)
        if declared is None:
            raise StageError("it is not in the catalog any more", code="unavailable")
        mends = pipeline in self._broken
        try:
            ready = await _within(LOAD_S, self._load(declared))
        except Exception:
            if mends:
                metrics.SUPERVISOR_EVENTS.labels(pipeline, "repair_failed").inc()
            self._broken.pop(pipeline, None)
            with contextlib.suppress(Away, StageError):
                await self._remove(pipeline)
            raise
        if mends:
            log.info("%s is whole again", pipeline, extra={"pipeline": pipeline})
            metrics.SUPERVISOR_EVENTS.labels(pipeline, "repaired").inc()
        return ready

    async def unload(self, pipeline: str) -> None:
        self._loaded.discard(pipeline)
        self._broken.pop(pipeline, None)
        await self._lanes.close(pipeline)
        with contextlib.suppress(Away):  # what has died holds nothing
            await self._remove(pipeline)

    async def park(self, pipeline: str) -> Memory | None:
        return await self._operate(pipeline, "park")

    async def wake(self, pipeline: str) -> Memory | None:
        return await self._operate(pipeline, "wake")

    # What happens to processes (`gateway.supervisor.Concerned`).

    def stub_died(self, stub: Stub) -> None:
        owner = self._owner(stub.model)
        if owner is None:
            return  # of a pipeline that is being loaded or unloaded: who does that finds out
        pipeline, stage = owner
        extra = {"pipeline": pipeline, "stage": stage}
        log.error("stage %s of %s died (pid %d)", stage, pipeline, stub.pid, extra=extra)
        metrics.SUPERVISOR_EVENTS.labels(pipeline, "stub_died").inc()
        # The orchestrator's call in flight to the dead stage never returns, and its poller's thread with it.
        self._broken.setdefault(pipeline, set()).update({stage, _ORCHESTRATOR})
        how = self._hung.pop((pipeline, stage), "died")
        message = f"The {stage} stage of '{pipeline}' {how}; it is being replaced."
        self._lose(pipeline, StageError(message, code="unavailable", stage=stage))

    def triton_died(self) -> None:
        self._up.clear()
        self._broken.clear()
        for pipeline in list(self._loaded):
            self._lose(pipeline, StageError("Triton died; it is being restarted.", code="unavailable"))

    def triton_is_up(self) -> None:
        self._up.set()

    def unhealthy(self, pipeline: str, stage: str) -> None:
        """Triton finds that this stub answers no more, and does nothing about it."""
        metrics.SUPERVISOR_EVENTS.labels(pipeline, "stub_unhealthy").inc()
        self._end(pipeline, stage, "does not answer")

    def hangs(self, stall: Stall) -> None:
        metrics.SUPERVISOR_EVENTS.labels(stall.pipeline, "stub_hung").inc()
        self._end(stall.pipeline, stall.stage, f"hung ({stall.reason})")

    def _end(self, pipeline: str, stage: str, how: str) -> None:
        """It is then replaced like a dead one."""
        log.error("stage %s of %s %s", stage, pipeline, how, extra={"pipeline": pipeline, "stage": stage})
        self._hung[pipeline, stage] = how
        self._supervisor.end(model_name(pipeline, stage))

    def _lose(self, pipeline: str, error: StageError) -> None:
        self._loaded.discard(pipeline)
        self._lanes.lose(pipeline, error)
        self._on_lost(pipeline, error.message)

    def _owner(self, model: str) -> tuple[str, str] | None:
        owners = ((pipeline, stage) for pipeline in self._loaded for stage in MODELS)
        return next((owner for owner in owners if model_name(*owner) == model), None)

    # How.

    async def _load(self, pipeline: Pipeline) -> Ready:
        """Once Triton is there; if it dies meanwhile, again."""
        while True:
            await self._up.wait()
            try:
                return await self._load_once(pipeline)
            except Away:
                await asyncio.sleep(0.1)  # its death is noticed, and then it is waited for
            except StageError:
                if self._up.is_set():
                    raise

    async def _load_once(self, pipeline: Pipeline) -> Ready:
        began = time.monotonic()
        await self._load_models(pipeline)
        loaded_s = time.monotonic() - began
        self._supervisor.watch()
        self._check_stages(pipeline)  # one that dies from here on is told of (`stub_died`)
        lane = self._lanes.open(pipeline.name)
        self._loaded.add(pipeline.name)
        self._broken.pop(pipeline.name, None)
        await lane.opened()
        state = await self._control.operate(model_name(pipeline.name, "generate"), "state", _ANSWER_S)
        phases = _phases(state["phases_s"], loaded_s)
        memory = self._memory(pipeline.name, int(state["gpu_bytes"]))
        return Ready(memory, {**phases, "lane": time.monotonic() - began - loaded_s}, bool(state["can_park"]))

    async def _load_models(self, pipeline: Pipeline) -> None:
        render(pipeline, self._repository)
        broken = self._broken.get(pipeline.name, set(MODELS))
        standing = {
            model
            for model in MODELS
            if model not in broken and self._supervisor.stubs_of(model_name(pipeline.name, model))
        }
        if standing:  # the ensemble comes back with its members
            old = fresh = [model for model in MODELS if model not in standing and model != ENSEMBLE]
        else:  # and brings them
            old, fresh = list(MODELS), [ENSEMBLE, _ORCHESTRATOR]
        await self._unload_models(pipeline.name, old)
        # What is in flight on a dead stub pins the old copy for ever; loading beside it works (DESIGN §4).
        stages = [model for model in fresh if model != _ORCHESTRATOR]
        await self._watching(
            _all([self._in_turn(pipeline.name, stages), self._in_turn(pipeline.name, [_ORCHESTRATOR])])
        )

    def _check_stages(self, pipeline: Pipeline) -> None:
        """Triton calls a model ready whose process has died since, and nobody would ever hear of it."""
        for stage in (model for model in MODELS if model != ENSEMBLE):
            wanted = pipeline.preprocess_instances if stage == "preprocess" else 1
            if len(self._supervisor.stubs_of(model_name(pipeline.name, stage))) < wanted:
                message = f"its {stage} stage died as soon as it was loaded"
                raise StageError(message, code="unavailable", stage=stage)

    async def _in_turn(self, pipeline: str, models: Iterable[str]) -> None:
        """Triton does not load two members of an ensemble at once, unless it does so by itself."""
        for model in models:
            await self._control.load(model_name(pipeline, model), LOAD_S)

    async def _watching(self, load: Awaitable[None]) -> None:
        """Of a stub that dies while it loads, Triton leaves the shared memory: so it is known before it dies."""
        loading = asyncio.ensure_future(load)
        try:
            while not (await asyncio.wait((loading,), timeout=_WATCH_S))[0]:
                self._supervisor.watch()
            loading.result()
        finally:
            loading.cancel()

    async def _remove(self, pipeline: str) -> None:
        await self._lanes.close(pipeline)
        self._loaded.discard(pipeline)
        self._supervisor.watch()
        await self._unload_models(pipeline, [_ORCHESTRATOR, ENSEMBLE, *MODELS])
        deadline = time.monotonic() + _GONE_S
        while any(self._supervisor.stubs_of(model_name(pipeline, model)) for model in MODELS):
            if time.monotonic() > deadline:
                for model in MODELS:
                    self._supervisor.end(model_name(pipeline, model))
                deadline = float("inf")  # nothing outlives that
            await asyncio.sleep(0.02)

    async def _unload_models(self, pipeline: str, models: Iterable[str]) -> None:
        for model in dict.fromkeys(models):
            if model != ENSEMBLE and model in self._broken.get(pipeline, ()):
                if model == _ORCHESTRATOR and self._supervisor.stubs_of(model_name(pipeline, model)):
                    # A process that is killed while it makes a call holds a lock that tritonserver then aborts on
                    # (boost::interprocess::lock_exception: 1 of 10 kills of preprocess on a busy machine).
                    await self._control.quiesce(model_name(pipeline, model), _QUIET_S)
                    await asyncio.sleep(_QUIET_S)
                self._supervisor.end(model_name(pipeline, model))
            await self._control.unload(model_name(pipeline, model))

    async def _operate(self, pipeline: str, operation: str) -> Memory | None:
        generate = model_name(pipeline, "generate")
        try:
            await self._control.operate(generate, operation, _OPERATE_S)
            state = await self._control.operate(generate, "state", _ANSWER_S)
            return self._memory(pipeline, int(state["gpu_bytes"]))
        except (Away, StageError) as error:
            self._broken[pipeline] = set(MODELS)
            self._lose_quietly(pipeline)
            raise StageError(f"it could not {operation}: {error}", code="unavailable") from None

    def _lose_quietly(self, pipeline: str) -> None:
        """Its work says what has become of it."""
        self._loaded.discard(pipeline)
        self._lanes.lose(pipeline, StageError(f"'{pipeline}' is being replaced.", code="unavailable"))

    def _memory(self, pipeline: str, gpu_bytes: int) -> Memory | None:
        """What its stages' processes take; what they share with others, by their share of it."""
        stubs = [stub for model in MODELS for stub in self._supervisor.stubs_of(model_name(pipeline, model))]
        sizes = [resident(stub.pid) for stub in stubs]
        return Memory(sum(sizes), gpu_bytes) if sizes and all(sizes) else None


def _phases(told: Mapping[str, float], loaded_s: float) -> dict[str, float]:
    """Of generate, which is what a load waits for; what it does not account for is Triton's own. In order."""
    known = {phase: float(seconds) for phase, seconds in told.items()}
    rest = max(0.0, loaded_s - sum(known.values()))
    return {"triton": rest, **known}


def resident(pid: int) -> int:
    """Bytes of memory of a process, shared pages by its share of them (proc(5), smaps_rollup: Pss)."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


async def _within(seconds: float, work: Awaitable[T]) -> T:
    try:
        return await within(seconds, work)
    except asyncio.TimeoutError:
        raise StageError(f"it was not loaded within {seconds:g} s", code="unavailable") from None


async def _all(works: Iterable[Awaitable[None]]) -> None:
    """Together; the first failure is raised when all have ended."""
    for failed in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(failed, BaseException):
            raise failed
