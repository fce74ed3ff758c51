"""`python -m bench.soak --minutes 10 --seed 1`: starts the product, breaks it by plan under load, and judges.

The last line is JSON; the exit code is 1 if a goal was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from bench import processes
from bench.client import Endpoint
from bench.echoes import Served, declaration, serving
from bench.report import json_line, median, milliseconds, table
from bench.soak import judge
from bench.soak.asks import Echo, Echoed
from bench.soak.faults import Faults
from bench.soak.held import Held, held, leaks
from bench.soak.judge import Tally
from bench.soak.plan import STOP, TRITON, Fault, plan
from bench.soak.run import Record, Soak, learn
from pipelines.pipeline import DEFAULT, get_pipeline
from pipelines.sources import pull

ECHOES = (Echo("soak-paced", 100), Echo("soak-free", 0), Echo("soak-token", 0))
_KEYS: dict[str, dict[str, str | int]] = {
    "soak-paced": {"echo_tokens_per_s": 100},
    "soak-free": {},
    "soak-token": {"stream_event": "token"},
}
WRITE_TIMEOUT_S = 5
SHOWN = 20  # failures


async def soak(served: Served, given: argparse.Namespace, planned: Sequence[Fault]) -> dict[str, Any]:
    endpoint = Endpoint(served.url + "/v1")
    echoed = Echoed(pull(get_pipeline(DEFAULT)))
    faults = Faults(served, ECHOES, WRITE_TIMEOUT_S, given.seed)
    run = Soak(endpoint, ECHOES, echoed, faults, await learn(endpoint, given.model))
    await Soak(endpoint, ECHOES, echoed, faults, run.known).run(5, given.callers, given.seed, [])  # a warm-up
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
