"""`python -m bench.soak --minutes 10 --seed 1`: starts the product, breaks it by plan under load, and judges.

The last line is JSON; the exit code is 1 if a goal was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from bench import processes
from bench.client import Client, Endpoint, Result
from bench.echoes import Served, declaration, serving
from bench.report import json_line, median, milliseconds, table
from bench.soak import asks, judge
from bench.soak.asks import Ask, Echo, Echoed
from bench.soak.faults import Faults
from bench.soak.held import Held, held, leaks
from bench.soak.judge import Tally, Window
from bench.soak.plan import STOP, TRITON, Fault, plan
from pipelines.pipeline import DEFAULT, get_pipeline
from pipelines.sources import pull

ECHOES = (Echo("soak-paced", 100), Echo("soak-free", 0), Echo("soak-token", 0))
_KEYS: dict[str, dict[str, str | int]] = {
    "soak-paced": {"echo_tokens_per_s": 100},
    "soak-free": {},
    "soak-token": {"stream_event": "token"},
}
WRITE_TIMEOUT_S = 5
THINK_S = 0.1  # a client's mean, between an answer and its next request
RESCUE_S = 60.0  # a stopped process that was not replaced by then goes on, and that is a problem
PROBE_EVERY_S, PROBE_S = 0.1, 1.0
SETTLE_S = 1.0  # a pipeline is back with the first of so many seconds of right answers
LAG_EVERY_S = 0.05
SHOWN = 20  # failures
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
                ask = asks.draw(dice, ECHOES, self.echoed.completion, self.echoed.chat, json.dumps)
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
            self.windows.append(window)
        print(f"{self.now:7.1f} s  {fault}", file=sys.stderr)
        doing = asyncio.create_task(self.faults.perform(fault))
        touched = [echo.name for echo in ECHOES if fault.touches(echo.name)]
        touched += sorted({ask.pipeline for ask in self.known if fault.touches(ask.pipeline)})
        watching = [asyncio.create_task(self._watch(window, name)) for name in touched]
        if watching:
            _, late = await asyncio.wait(watching, timeout=RESCUE_S)
            if late and self.faults.resume(fault):
                self.problems.append(f"not replaced within {RESCUE_S:g} s: {fault}")
            _, late = await asyncio.wait(watching, timeout=RESCUE_S)
            for task in late:
                task.cancel()
        await doing
        if window.mended:
            print(f"{self.now:7.1f} s  back after {max(window.recovery_s.values()):.1f} s: {fault}", file=sys.stderr)

    async def _watch(self, window: Window, pipeline: str) -> None:
        """Ask it until it answers, and has for a while."""
        probe = self._probe(pipeline)
        client = Client(self.endpoint)
        await asyncio.sleep(PROBE_EVERY_S)  # the signal goes first
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


async def soak(served: Served, given: argparse.Namespace, planned: Sequence[Fault]) -> dict[str, Any]:
    endpoint = Endpoint(served.url + "/v1")
    echoed = Echoed(pull(get_pipeline(DEFAULT)))
    faults = Faults(served, ECHOES, WRITE_TIMEOUT_S, given.seed)
    run = Soak(endpoint, echoed, faults, await learn(endpoint, given.model))
    await Soak(endpoint, echoed, faults, run.known).run(5, given.callers, given.seed, [])  # a warm-up
    before = held(served.pid)
    await run.run(given.minutes * 60, given.callers, given.seed, planned)
    after, problems = await _at_rest(served, before, ended=2 * len(run.windows))  # the orchestrator goes with a stage
    return found(run, before, after, [*run.problems, *faults.problems, *problems], given)


async def _at_rest(served: Served, before: Held, ended: int) -> tuple[Held, list[str]]:
    """What is held in the end; what has just ended needs a moment to be gone."""
    for _ in range(30):
        after = held(served.pid)
        if not (problems := leaks(before, after, ended)):
            break
        await asyncio.sleep(0.5)
    return after, problems


def found(run: Soak, before: Held, after: Held, problems: Sequence[str], given: argparse.Namespace) -> dict[str, Any]:
    tally = Tally()
    failures = []
    for record in run.records:
        judged = judge.judge(record.ask, record.result, record.outcome, run.windows)
        tally.add(judged)
        excused = judged.on_fault and judged.outcome in (judge.REFUSED, judge.FAILED)
        if judged.late or not (excused or judged.outcome in judge.SUCCESSES):
            failures.append((record, judged))
    print(
        table(
            ["outcome", "off fault", "on fault"], [[n, tally.off_fault[n], tally.on_fault[n]] for n in judge.OUTCOMES]
        )
    )
    recovery: dict[str, list[float]] = {}
    for window in run.windows:
        for seconds in window.recovery_s.values():
            recovery.setdefault(_kind(window.fault), []).append(seconds)
    rows = [[kind, len(seconds), median(seconds), max(seconds)] for kind, seconds in sorted(recovery.items())]
    print("\n" + table(["back after, s", "times", "median", "most"], rows))
    names = sorted({*before.resident, *after.resident})
    rows = [[name, *(side.resident.get(name, 0) / 2**20 for side in (before, after))] for name in names]
    print("\n" + table(["MiB", "before", "after"], rows))
    for name in ("shared_memory", "descriptors", "zombies"):
        print(f"{name}: {getattr(before, name)} before, {getattr(after, name)} after")
    lag_ms = milliseconds(run.lags_s)
    print(f"these clients themselves came late by p50 {lag_ms['p50']:.0f} ms, p99 {lag_ms['p99']:.0f} ms")
    for record, judged in failures[:SHOWN]:
        print(_told(record, judged, run.began))
    pipelines = [echo.name for echo in ECHOES] + sorted({ask.pipeline for ask in run.known})
    missed = judge.missed(tally, run.windows, pipelines, problems)
    print("\n" + ("\n".join(f"MISSED: {goal}" for goal in missed) or "passed"))
    return {
        "minutes": given.minutes,
        "seed": given.seed,
        "requests": len(run.records),
        "success_off_fault": tally.success_off_fault,
        "past_deadline": tally.late,
        "hangs": tally.count(judge.HANG),
        "wrong": tally.count(judge.WRONG),
        "broken": tally.count(judge.BROKEN),
        "off_fault": dict(tally.off_fault),
        "on_fault": dict(tally.on_fault),
        "recovery_s": {kind: {"median": median(s), "most": max(s)} for kind, s in sorted(recovery.items())},
        "clients_late_ms": lag_ms,
        "load_average": os.getloadavg()[0],
        "missed": missed,
    }


def _kind(fault: Fault) -> str:
    if fault.kind == TRITON:
        return fault.kind
    paused = fault.kind == STOP and fault.resumed_after is not None
    return f"{'pause' if paused else fault.kind} {fault.stage}"


def _told(record: Record, judged: judge.Judged, began: float) -> str:
    ask, result = record.ask, record.result
    when = f"{result.started - began:.1f} to {result.ended - began:.1f} s, deadline {ask.deadline_s:.1f} s"
    where = "on a faulted pipeline" if judged.on_fault else "off fault"
    what = f"{ask.pipeline} {ask.path} stream={ask.stream} of {ask.tokens} tokens"
    return f"{judged.outcome}{', late' if judged.late else ''}, {where}: {what}, {when}: {result.error} {result.status}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description="Faults under load, judged.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=30, metavar="S", help="from fault to fault")
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--model", action="append", default=[], help="also asked, and broken: one of the catalog")
    parser.add_argument("--plan", action="store_true", help="print the faults of this seed, and nothing more")
    parser.add_argument("--log", type=Path, help="where the product's log is left")
    given = parser.parse_args(arguments)
    if given.minutes <= 0 or given.every <= 0 or given.callers < 1:
        parser.error("--minutes, --every and --callers must be more than 0")
    planned = plan(given.seed, given.minutes * 60, given.every, [*(echo.name for echo in ECHOES), *given.model])
    print("\n".join([f"faults of seed {given.seed}:", *(f"{fault.at:7.1f} s  {fault}" for fault in planned)]))
    if given.plan:
        return 0
    settings = {"TRIPTYCH_WRITE_TIMEOUT_S": str(WRITE_TIMEOUT_S)}
    echoes = [declaration(echo.name, max_running=1024, context=32_768, **_KEYS[echo.name]) for echo in ECHOES]
    with processes.terminated_as_exit(), tempfile.TemporaryDirectory(prefix="triptych-soak-") as folder:
        try:
            with serving(Path(folder), echoes, given.model, settings) as served:
                try:
                    result = uvloop.run(soak(served, given, planned))
                finally:
                    if given.log:
                        with contextlib.suppress(OSError):
                            given.log.write_bytes(served.log.read_bytes())
        except processes.StartError as error:
            print(f"bench.soak: {error}", file=sys.stderr)
            return 1
    print(json_line(result))
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
