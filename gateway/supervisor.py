"""Watches Triton and its stubs, and brings back what has died: a stage's process, or the whole server.

Triton goes on calling a model whose stub is dead ready, and what was in flight there never returns (DESIGN §4): so
its requests are failed here, at once, and its models are loaded anew. Knows no HTTP and nothing of what stages do.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
from collections.abc import Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway.lane import RECONNECT, Lanes
from gateway.triton import Stub, Triton, TritonError
from observability import metrics
from pipelines.contracts import ENSEMBLE, MODELS, model_name
from pipelines.errors import StageError
from pipelines.pipeline import Pipeline

log = logging.getLogger(__name__)

_LOAD_S = 300.0
_BACKOFF_S = (1, 2, 4, 8, 15, 30)


class Supervisor:
    """`run` until cancelled."""

    def __init__(self, triton: Triton, lanes: Lanes, pipelines: Sequence[Pipeline]) -> None:
        self._triton = triton
        self._lanes = lanes
        self._pipelines = [pipeline.name for pipeline in pipelines]
        self._owners = {
            model_name(pipeline.name, model): (pipeline.name, model)
            for pipeline in pipelines
            for model in MODELS
            if model != ENSEMBLE
        }
        self._watched: dict[str, Stub] = {}  # by region: a model may have several processes
        self._repairs: dict[str, asyncio.Task[None]] = {}
        self._broken: dict[str, set[str]] = {}  # by pipeline, the models to bring back
        self._control: Any = None
        lanes.on_unhealthy = self.end

    def end(self, pipeline: str, stage: str) -> None:
        """A stub that Triton finds unhealthy answers no more: it is ended, and then replaced like a dead one."""
        for stub in self._stubs_of(pipeline, stage):
            log.error("stage %s of %s does not answer", stage, pipeline, extra={"pipeline": pipeline, "stage": stage})
            metrics.SUPERVISOR_EVENTS.labels(pipeline, "stub_unhealthy").inc()
            with contextlib.suppress(ProcessLookupError):
                os.kill(stub.pid, signal.SIGKILL)

    def _stubs_of(self, pipeline: str, stage: str) -> list[Stub]:
        name = model_name(pipeline, stage)
        return [stub for stub in self._watched.values() if stub.model == name]

    async def run(self) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._triton.grpc_port}", RECONNECT) as channel:
            self._control = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                while True:
                    self._watch()
                    await _ended(self._triton.pid)
                    await self._restart()
            finally:
                self._forget_all()

    async def _restart(self) -> None:
        """Triton has died, and every pipeline with it."""
        log.error("tritonserver died; its log: %s", self._triton.log_file)
        metrics.SUPERVISOR_EVENTS.labels("", "triton_died").inc()
        for pipeline in self._pipelines:
            self._lanes.suspend(pipeline, StageError("Triton died; it is being restarted.", code="unavailable"))
        self._forget_all()
        for delay in itertools.chain(_BACKOFF_S, itertools.repeat(_BACKOFF_S[-1])):
            self._triton.clean_up()
            try:
                self._triton.start()  # in this thread, the main one: the server is told to die with it
                await asyncio.to_thread(self._triton.wait_ready, _LOAD_S, lambda model: None)
                break
            except TritonError as error:
                log.error("Triton could not be restarted, again in %d s: %s", delay, error)
                await asyncio.sleep(delay)
                await asyncio.to_thread(self._triton.stop)
        for pipeline in self._pipelines:
            self._lanes.resume(pipeline)
        metrics.SUPERVISOR_EVENTS.labels("", "triton_restarted").inc()
        log.info("Triton is back")

    def _watch(self) -> None:
        """A descriptor of each stub's process becomes readable when it ends: no polling, no reused pid."""
        for stub in self._triton.stubs():
            if stub.model in self._owners and stub.region not in self._watched:
                self._watched[stub.region] = stub
                asyncio.get_running_loop().add_reader(stub.descriptor, self._died, stub)
            else:
                os.close(stub.descriptor)

    def _forget_all(self) -> None:
        for repair in self._repairs.values():
            repair.cancel()
        for stub in self._watched.values():
            self._forget(stub)
        for state in (self._repairs, self._watched, self._broken):
            state.clear()

    def _forget(self, stub: Stub) -> None:
        asyncio.get_running_loop().remove_reader(stub.descriptor)
        os.close(stub.descriptor)

    def _died(self, stub: Stub) -> None:
        self._forget(stub)
        del self._watched[stub.region]
        stub.remove_shm()
        if not self._triton.running():
            return  # the whole server went: not ours to mend
        pipeline, stage = self._owners[stub.model]
        log.error(
            "stage %s of %s died (pid %d)", stage, pipeline, stub.pid, extra={"pipeline": pipeline, "stage": stage}
        )
        metrics.SUPERVISOR_EVENTS.labels(pipeline, "stub_died").inc()
        error = StageError(
            f"The {stage} stage of '{pipeline}' died; it is being replaced.", code="unavailable", stage=stage
        )
        self._lanes.suspend(pipeline, error)
        # The orchestrator's call in flight to the dead stage never returns, and its poller's thread with it.
        self._broken.setdefault(pipeline, set()).update({stage, "orchestrator"})
        if pipeline not in self._repairs:
            self._repairs[pipeline] = asyncio.create_task(self._repair(pipeline), name=f"repair {pipeline}")

    async def _repair(self, pipeline: str) -> None:
        """Until everything broken is loaded anew; more may break meanwhile."""
        for attempt in itertools.count():
            models = sorted(self._broken[pipeline], key=MODELS.index)  # the orchestrator last
            try:
                await self._reload(pipeline, models)
            except (grpc.RpcError, StageError) as error:
                delay = _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)]
                details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
                log.error("%s could not be repaired, again in %d s: %s", pipeline, delay, details)
                metrics.SUPERVISOR_EVENTS.labels(pipeline, "repair_failed").inc()
                await asyncio.sleep(delay)
                continue
            self._watch()
            self._broken[pipeline] -= {model for model in models if self._stubs_of(pipeline, model)}
            if not self._broken[pipeline]:
                break
        del self._repairs[pipeline]
        self._lanes.resume(pipeline)
        metrics.SUPERVISOR_EVENTS.labels(pipeline, "repaired").inc()
        log.info("%s is whole again", pipeline)

    async def _reload(self, pipeline: str, models: list[str]) -> None:
        for model in models:
            for stub in self._stubs_of(pipeline, model):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stub.pid, signal.SIGKILL)  # `_died` then adds nothing that is not here
        for model in models:
            request = service_pb2.RepositoryModelUnloadRequest(model_name=model_name(pipeline, model))
            await self._control.RepositoryModelUnload(request, timeout=30)
        for model in models:
            # What is in flight on the dead stub pins the old copy for ever; loading beside it works (DESIGN §4).
            request = service_pb2.RepositoryModelLoadRequest(model_name=model_name(pipeline, model))
            await self._control.RepositoryModelLoad(request, timeout=_LOAD_S)


async def _ended(pid: int) -> None:
    """Until this process ends."""
    descriptor = os.pidfd_open(pid)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
