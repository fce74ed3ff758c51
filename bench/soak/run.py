"""One run of a soak: clients that ask and faults that happen, side by side, and a watch on what comes back.

Knows when; what is asked, broken and judged is said by others. Prints each fault as it happens.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.client import Client, Endpoint, Result
from bench.soak import asks, judge
from bench.soak.asks import Ask, Echo, Echoed
from bench.soak.faults import Faults
from bench.soak.judge import Window
from bench.soak.plan import STOP, Fault

THINK_S = 0.1  # a client's mean, between an answer and its next request
RESCUE_S = 60.0  # a stopped process that was not replaced by then goes on, and that is a problem
PROBE_EVERY_S, PROBE_S = 0.1, 1.0
SETTLE_S = 1.0  # a pipeline is back with the first of so many seconds of right answers
LAG_EVERY_S = 0.05
ASKED_OF_A_MODEL = 8


@dataclass
class Record:
    """A request that has ended."""

    ask: Ask
    result: Result
    outcome: str


@dataclass
class Soak:
    """One run: clients, faults and what is seen of both."""

    endpoint: Endpoint
    echoes: Sequence[Echo]
    echoed: Echoed
    faults: Faults
    known: Sequence[Ask]  # of models that are no echo
    began: float = field(default_factory=time.perf_counter)
    records: list[Record] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)  # by which this process itself came late: it is no fast client
    over: bool = False

    @property
    def now(self) -> float:
        return time.perf_counter() - self.began

    async def run(self, seconds: float, callers: int, seed: int, planned: Sequence[Fault]) -> None:
        self.began = time.perf_counter()
        clients = [asyncio.create_task(self._caller(random.Random(f"{seed} {number}"))) for number in range(callers)]
        clients.append(asyncio.create_task(self._lag()))
        watches = []
        for fault in planned:
            await asyncio.sleep(max(0.0, fault.at - self.now))
            watches.append(asyncio.create_task(self._break(fault)))
        await asyncio.sleep(max(0.0, seconds - self.now))
        await asyncio.gather(*watches)
        self.over = True
        await asyncio.gather(*clients)

    async def _caller(self, dice: random.Random) -> None:
        client = Client(self.endpoint)
        while not self.over:
            if self.known and dice.random() < 0.1:
                ask = dice.choice(self.known)
            else:
                ask = asks.draw(dice, self.echoes, self.echoed.completion, self.echoed.chat, json.dumps)
            result = await _asked(client, ask)
            outcome = judge.outcome(ask, result)
            if outcome in judge.SUCCESSES:
                result.text = None  # a long soak need not hold it
            self.records.append(Record(ask, result, outcome))
            await asyncio.sleep(dice.expovariate(1 / THINK_S))
        client.close()

    async def _lag(self) -> None:
        while not self.over:
            due = time.perf_counter() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            self.lags_s.append(time.perf_counter() - due)

    async def _break(self, fault: Fault) -> None:
        window = Window(fault, time.perf_counter())
        if fault.breaks:
            if not self.faults.strike(fault):
                print(f"{self.now:7.1f} s  nobody there: {fault}", file=sys.stderr)
                return
            self.windows.append(window)
        print(f"{self.now:7.1f} s  {fault}", file=sys.stderr)
        doing = asyncio.create_task(self.faults.carry_on(fault))
        touched = [echo.name for echo in self.echoes if fault.touches(echo.name)]
        touched += sorted({ask.pipeline for ask in self.known if fault.touches(ask.pipeline)})
        watching = [asyncio.create_task(self._watch(window, name)) for name in touched]
        if watching:
            _, late = await asyncio.wait(watching, timeout=RESCUE_S)
            if late and fault.kind == STOP and self.faults.resume(fault):
                self.problems.append(f"not replaced within {RESCUE_S:g} s: {fault}")
            _, late = await asyncio.wait(watching, timeout=RESCUE_S)
            for task in late:
                task.cancel()
        await doing
        self.faults.forget(fault)
        if window.mended:
            print(f"{self.now:7.1f} s  back after {max(window.recovery_s.values()):.1f} s: {fault}", file=sys.stderr)

    async def _watch(self, window: Window, pipeline: str) -> None:
        """Ask it until it answers, and has for a while."""
        probe = self._probe(pipeline)
        client = Client(self.endpoint)
        back: float | None = None
        while True:
            result = await _asked(client, probe)
            if judge.outcome(probe, result) != judge.EXACT:
                back = None
            elif back is None:
                back = result.ended
            elif result.ended - back >= SETTLE_S:
                window.mended[pipeline] = back
                client.close()
                return
            await asyncio.sleep(PROBE_EVERY_S)

    def _probe(self, pipeline: str) -> Ask:
        for ask in self.known:
            if ask.pipeline == pipeline:
                return ask
        body = {"model": pipeline, "prompt": "are you there", "max_tokens": 4, "stream": False}
        return Ask(pipeline, "/completions", body, PROBE_S, self.echoed.completion("are you there", 4), 4)


async def _asked(client: Client, ask: Ask) -> Result:
    patience_s = ask.deadline_s + judge.HANG_S
    return await client.post(ask.path, ask.body, timeout=patience_s, headers=ask.headers, keep_text=True)


async def learn(endpoint: Endpoint, models: Sequence[str]) -> list[Ask]:
    """Requests of models that are no echo: what they answer now, alone and greedily, they must answer always."""
    client, known = Client(endpoint), []
    for model in models:
        for number in range(ASKED_OF_A_MODEL):
            content = f"Name {number + 2} fruits."
            body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": content}]}
            body |= {"max_tokens": 24, "temperature": 0, "stream": bool(number % 2)}
            if body["stream"]:
                body["stream_options"] = {"include_usage": True}
            ask = Ask(model, "/chat/completions", body, 60.0, None, 0)
            result = await _asked(client, ask)
            if result.error or result.tokens is None:
                raise RuntimeError(f"{model} does not answer: {result.error}")
            known.append(Ask(model, ask.path, body, 60.0, "".join(result.text or ()), result.tokens))
    client.close()
    return known
