"""Watches the processes of Triton, of its stubs and of the zygote, and brings Triton and the zygote back.

Triton goes on calling a model whose stub is dead ready, and what was in flight there never returns (DESIGN §4): so
whoever has pipelines there is told at once (`gateway.loader`). Knows no pipeline and no model beyond its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import time
from typing import Protocol

from gateway.control import Control
from gateway.installed import TritonError
from gateway.triton import Stub, Triton
from gateway.within import within
from observability import metrics

log = logging.getLogger(__name__)

START_S = 60.0
_BACKOFF_S = (1, 2, 4, 8, 15, 30)
_LASTED_S = 60.0  # what has run so long before it died is begun again soon


class Concerned(Protocol):
    """Who is told. Each is called in the event loop, and returns at once."""

    def stub_died(self, stub: Stub) -> None: ...

    def triton_died(self) -> None: ...

    def triton_is_up(self) -> None: ...


class Supervisor:
    """`run` until cancelled; Triton has been started by then."""

    def __init__(self, triton: Triton, control: Control) -> None:
        self._triton = triton
        self._control = control
        self._watched: dict[str, Stub] = {}  # by region: a model may have several processes

    def watch(self) -> None:
        """Also the stubs that are new. A descriptor of a process becomes readable when it ends: no polling, and no
        pid that another has been given meanwhile."""
        for stub in self._triton.stubs():
            if stub.region not in self._watched:
                self._watched[stub.region] = stub
                asyncio.get_running_loop().add_reader(stub.descriptor, self._died, stub)
            else:
                os.close(stub.descriptor)

    def stubs_of(self, model: str) -> list[Stub]:
        return [stub for stub in self._watched.values() if stub.model == model]

    def end(self, model: str) -> None:
        """Whatever it is doing. Its death is told like any other."""
        for stub in self.stubs_of(model):
            with contextlib.suppress(ProcessLookupError):
                os.kill(stub.pid, signal.SIGKILL)

    def end_triton(self) -> None:
        """One that does not answer: it is then started anew."""
        metrics.SUPERVISOR_EVENTS.labels("", "triton_hung").inc()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._triton.pid, signal.SIGKILL)

    async def run(self, concerned: Concerned) -> None:
        self._concerned = concerned
        keeping = asyncio.create_task(self._keep_zygote(), name="zygote")
        try:
            while True:
                await self._started()
                concerned.triton_is_up()
                await _ended(self._triton.pid)
                log.error("tritonserver died; its log: %s", self._triton.log_file)
                metrics.SUPERVISOR_EVENTS.labels("", "triton_died").inc()
                self._forget_all()
                concerned.triton_died()
                await self._restart()
                metrics.SUPERVISOR_EVENTS.labels("", "triton_restarted").inc()
                log.info("Triton is back")
        finally:
            keeping.cancel()
            self._forget_all()

    async def _started(self) -> None:
        """Until it answers, or has died."""
        while self._triton.running() and not await self._control.live(1.0):
            await asyncio.sleep(0.02)

    async def _restart(self) -> None:
        for delay in itertools.chain(_BACKOFF_S, itertools.repeat(_BACKOFF_S[-1])):
            self._triton.clean_up()
            try:
                self._triton.start()  # in this thread, the main one: the server is told to die with it
                await within(START_S, self._started())
                if self._triton.running():
                    return
                log.error("Triton could not be restarted, again in %d s: %s", delay, self._triton.last_error())
            except (TritonError, asyncio.TimeoutError) as error:
                log.error("Triton could not be restarted, again in %d s: %s", delay, error or "it does not answer")
            await asyncio.sleep(delay)
            await asyncio.to_thread(self._triton.stop)

    async def _keep_zygote(self) -> None:
        """Without it loads take longer, and nothing else."""
        delays = iter(_BACKOFF_S)
        while zygote := self._triton.zygote:
            began = time.monotonic()
            await _ended(zygote.pid)
            if time.monotonic() - began > _LASTED_S:
                delays = iter(_BACKOFF_S)
            delay = next(delays, _BACKOFF_S[-1])
            log.warning("the zygote died, another begins in %d s: loads take longer until then", delay)
            metrics.SUPERVISOR_EVENTS.labels("", "zygote_died").inc()
            await asyncio.sleep(delay)
            self._triton.start_zygote()

    def _died(self, stub: Stub) -> None:
        self._forget(stub)
        del self._watched[stub.region]
        stub.remove_shm()
        if self._triton.running():  # else the whole server went, and that is told
            self._concerned.stub_died(stub)

    def _forget_all(self) -> None:
        for stub in self._watched.values():
            self._forget(stub)
        self._watched.clear()

    def _forget(self, stub: Stub) -> None:
        asyncio.get_running_loop().remove_reader(stub.descriptor)
        os.close(stub.descriptor)


async def _ended(pid: int) -> None:
    """Until this process ends."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
