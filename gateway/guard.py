"""Ends what hangs: the watchdog's ears on the lanes, the calls that it wants made, and its verdicts carried out.

What is ended is then replaced like anything that has died (`gateway.loader`). Decides nothing itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from gateway.control import Away, Control
from gateway.supervisor import Supervisor
from gateway.watchdog import Patience, Stall, Watchdog
from pipelines.contracts import model_name
from pipelines.errors import StageError

log = logging.getLogger(__name__)

LOOK_S = 0.5
_TRITON_S = 3.0  # for the server itself to say that it lives


class Guard:
    """What a lane tells (`gateway.witness`) goes to the watchdog; `run` until cancelled."""

    def __init__(self, control: Control, supervisor: Supervisor, patience: Patience) -> None:
        self.end: Callable[[Stall], None] = lambda stall: None  # the loader's
        self._control = control
        self._supervisor = supervisor
        self._patience = patience
        self._watchdog = Watchdog(patience)
        self._asking: set[asyncio.Task[None]] = set()

    # What lanes tell.

    def opened(self, pipeline: str) -> None:
        self._watchdog.watch(pipeline, time.monotonic())

    def closed(self, pipeline: str) -> None:
        self._watchdog.forget(pipeline)

    def heard(self, pipeline: str, counters: Mapping[str, float]) -> None:
        self._watchdog.heard(pipeline, time.monotonic(), counters)

    def submitted(self, pipeline: str, id: str) -> None:
        self._watchdog.submitted(pipeline, id, time.monotonic())

    def taken(self, pipeline: str, id: str) -> None:
        self._watchdog.taken(pipeline, id, time.monotonic())

    def ended(self, pipeline: str, id: str) -> None:
        self._watchdog.ended(pipeline, id)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for pipeline, stage in self._watchdog.to_ask(time.monotonic()):
                task = asyncio.create_task(self._ask(pipeline, stage), name=f"is {stage} of {pipeline} there")
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)
            if stalls := self._watchdog.stalled(time.monotonic()):
                await self._act(stalls)

    async def _act(self, stalls: list[Stall]) -> None:
        if not await self._control.live(_TRITON_S):
            log.error("tritonserver does not answer: it is ended, and started anew")
            self._supervisor.end_triton()
            return
        for stall in stalls:
            self.end(stall)

    async def _ask(self, pipeline: str, stage: str) -> None:
        try:
            await self._control.probe(model_name(pipeline, stage), stage, self._patience.answer_s)
        except Away:
            return
        except StageError as error:
            if error.lost:
                return
        self._watchdog.answered(pipeline, stage)
