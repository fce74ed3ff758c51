"""Ten times as many requests as can be served: `python -m bench.overload [--seconds 60] [--times 10]`.

A paced echo, so that the limit is the gateway's concurrency and not the processor that the load is made on. First as
many callers as there are places, one request after the other: the peak. Then arrivals by the clock, whatever is
answered (an open loop), so many times as fast: interactive requests (`priority` 0) and batch ones (10).

What is refused must say so within milliseconds and with Retry-After; what is served, at the peak's rate; interactive
requests hardly later than at the peak; the queue within its bound, and the gateway no larger. Knows no admission.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import re
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvloop

from bench import processes
from bench.client import Client, Endpoint, Result
from bench.echoes import Served, declaration, serving
from bench.report import json_line, milliseconds, table
from bench.soak.asks import BATCH, INTERACTIVE

NAME = "echo-overload"
PACE = 50  # tokens a second
TOKENS = (10, 40)  # of an answer: were all alike, they would end all at once, and places come free in bursts
PATIENCE_S = 60.0
PEAK_S = 15.0
SAMPLE_S = 2.0  # a look at the queue is a scrape, which costs the gateway some milliseconds
GOODPUT, LATENCY, REFUSAL_MS = 0.9, 1.5, 10.0  # the goals
GROWTH_BYTES = 8 * 2**20


@dataclass
class Sample:
    """One request, and by how much it was sent later than it was due."""

    priority: int
    tokens: int
    result: Result
    lag_s: float = 0.0

    @property
    def good(self) -> bool:
        return self.result.error is None and self.result.tokens == self.tokens and self.result.finish_reason == "length"


@dataclass
class Load:
    """Requests, and what the gateway looked like meanwhile. `seconds` are the time that is counted."""

    samples: list[Sample] = field(default_factory=list)
    began: float = 0.0
    seconds: float = 0.0
    queued: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    gateway_cpu_s: float = 0.0

    def good(self, priority: int | None = None) -> list[Result]:
        """Answered as asked, within the time that is counted."""
        until = self.began + self.seconds
        return [
            sample.result
            for sample in self.samples
            if sample.good and priority in (None, sample.priority) and self.began <= sample.result.ended <= until
        ]

    @property
    def per_s(self) -> float:
        return len(self.good()) / self.seconds


async def _asked(client: Client, dice: random.Random, interactive: float) -> Sample:
    priority, tokens = INTERACTIVE if dice.random() < interactive else BATCH, dice.randint(*TOKENS)
    body: dict[str, Any] = {"model": NAME, "prompt": "to be or not", "max_tokens": tokens, "priority": priority}
    if dice.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Sample(priority, tokens, await client.post("/completions", body, timeout=PATIENCE_S))


async def at_capacity(endpoint: Endpoint, callers: int, seconds: float, interactive: float) -> Load:
    """Every place taken, and nobody waits."""
    load = Load(began=time.perf_counter(), seconds=seconds)

    async def caller(number: int) -> None:
        client, dice = Client(endpoint), random.Random(number)
        while time.perf_counter() < load.began + seconds:
            load.samples.append(await _asked(client, dice, interactive))
        client.close()

    await asyncio.gather(*(caller(number) for number in range(callers)))
    return load


async def open_loop(
    endpoint: Endpoint, rate: float, seconds: float, interactive: float, seed: int, served: Served
) -> Load:
    """Arrivals at `rate` a second, by chance; what is counted begins when all places have been taken once."""
    dice, idle = random.Random(seed), [Client(endpoint)]
    settle_s = TOKENS[1] / PACE
    load = Load(began=time.perf_counter() + settle_s, seconds=seconds)
    under_way: set[asyncio.Task[None]] = set()

    async def ask(due: float) -> None:
        client = idle.pop() if idle else Client(endpoint)
        lag_s = time.perf_counter() - due
        load.samples.append(replace(await _asked(client, dice, interactive), lag_s=lag_s))
        idle.append(client)

    watch = asyncio.create_task(_watch(served, load))
    cpu_s = processes.cpu_seconds([served.pid])
    due = time.perf_counter()
    while (due := due + dice.expovariate(rate)) < load.began + seconds:
        if (wait_s := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        task = asyncio.create_task(ask(due))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    watch.cancel()
    load.gateway_cpu_s = processes.cpu_seconds([served.pid]) - cpu_s
    await asyncio.gather(*under_way)
    for client in idle:
        client.close()
    return load


async def _watch(served: Served, load: Load) -> None:
    while True:
        await asyncio.sleep(SAMPLE_S)
        load.resident.append(sum(processes.resident([served.pid]).values()))
        with contextlib.suppress(OSError):  # a gateway that does not answer even that; there are other looks
            load.queued.append(await asyncio.to_thread(_queued, served.url))


def _queued(url: str) -> float:
    """How many wait to be admitted, by the gateway's own count."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        found = re.findall(r"^triptych_requests_queued\{.*\} (\S+)$", response.read().decode(), re.MULTILINE)
    return sum(map(float, found))


def verdict(peak: Load, over: Load, max_queue: int) -> dict[str, Any]:
    """What was found, and under `missed` the goals that were not reached."""
    refused = [sample.result for sample in over.samples if sample.result.status in (429, 503)]
    rude = sum("retry-after" not in result.headers for result in refused)
    broken = Counter(
        sample.result.error or "wrong answer"
        for load in (peak, over)
        for sample in load.samples
        if not sample.good and (load is peak or sample.result.status not in (429, 503))
    )
    # At the peak nobody waits, so there is no difference between the two kinds: all of them are its interactive ones.
    compared = {"peak": peak.good(), "overload": over.good(INTERACTIVE)}
    took = {name: milliseconds([result.ended - result.started for result in good]) for name, good in compared.items()}
    first = {name: milliseconds([r.first - r.started for r in good if r.first]) for name, good in compared.items()}
    refusal = milliseconds([result.ended - result.started for result in refused])
    inside = milliseconds([ms / 1000 for result in refused if (ms := _gateways_ms(result)) is not None])
    third = over.resident[len(over.resident) // 3] if over.resident else 0
    growth = over.resident[-1] - third if over.resident else 0
    goodput = over.per_s / peak.per_s if peak.per_s else 0.0
    slower = took["overload"]["p99"] / took["peak"]["p99"]
    most = max(over.queued, default=math.inf)  # never seen is not bounded
    asked = {name: sum(sample.priority == p for sample in over.samples) for name, p in _CLASSES.items()}
    goals = {
        f"goodput {goodput:.2f} of the peak, not {GOODPUT}": goodput >= GOODPUT,
        f"interactive p99 {slower:.2f} times the peak's, not {LATENCY}": slower <= LATENCY,
        f"p99 of refusals {refusal['p99']:.1f} ms, not {REFUSAL_MS:g}": not refused or refusal["p99"] <= REFUSAL_MS,
        f"{rude} refusals without Retry-After": not rude,
        f"{most:g} waiting, where {max_queue} may": most <= max_queue,
        f"the gateway grew by {growth / 2**20:.1f} MiB": growth <= GROWTH_BYTES,
        f"other failures: {dict(broken)}": not broken,
    }
    return {
        "peak_per_s": peak.per_s,
        "offered_per_s": len(over.samples) / over.seconds if over.seconds else 0.0,
        "goodput_per_s": over.per_s,
        "goodput_ratio": goodput,
        "interactive_ms": took,
        "interactive_first_token_ms": first,
        "interactive_p99_ratio": slower,
        "served_share": {name: len(over.good(p)) / max(1, asked[name]) for name, p in _CLASSES.items()},
        "refused": len(refused),
        "refused_without_retry_after": rude,
        "refusal_ms": refusal,
        "refusal_in_gateway_ms": inside,
        "gateway_cpu_ms_per_request": 1000 * over.gateway_cpu_s / max(1, len(over.samples)),
        "sent_late_ms": milliseconds([sample.lag_s for sample in over.samples]),
        "queue_most": most,
        "max_queue": max_queue,
        "gateway_mib": [size / 2**20 for size in (third, over.resident[-1])] if over.resident else [],
        "failures": dict(broken),
        "missed": [goal for goal, reached in goals.items() if not reached],
    }


_CLASSES = {"interactive": INTERACTIVE, "batch": BATCH}


def _gateways_ms(result: Result) -> float | None:
    """What the gateway itself counts from a request's headers to the response's (Server-Timing)."""
    found = re.search(r"total;dur=([\d.]+)", result.headers.get("server-timing", ""))
    return float(found[1]) if found else None


async def measure(served: Served, given: argparse.Namespace) -> dict[str, Any]:
    endpoint = Endpoint(served.url + "/v1")
    await at_capacity(endpoint, given.concurrency, 3, given.interactive)  # a warm-up
    peak = await at_capacity(endpoint, given.concurrency, PEAK_S, given.interactive)
    print(f"peak: {peak.per_s:.1f} requests/s", file=sys.stderr)
    rate = given.times * peak.per_s
    over = await open_loop(endpoint, rate, given.seconds, given.interactive, given.seed, served)
    found = verdict(peak, over, given.queue)
    return {"seconds": given.seconds, "times": given.times, "interactive_share": given.interactive, **found}


def print_found(found: dict[str, Any]) -> None:
    rows = [
        ["requests/s served", found["peak_per_s"], found["goodput_per_s"]],
        *(
            [f"interactive {name}, ms", *(found["interactive_ms"][side][name] for side in ("peak", "overload"))]
            for name in ("p50", "p99")
        ),
    ]
    print(table(["", "at the limit", f"{found['times']:g} times that"], rows))
    refusal, inside = found["refusal_ms"], found["refusal_in_gateway_ms"]
    print(
        f"\n{found['refused']} refused: p50 {refusal['p50']:.2f} ms, p99 {refusal['p99']:.2f} (in the gateway: ", end=""
    )
    print(f"{inside['p50']:.2f}, {inside['p99']:.2f}); sent late by p99 {found['sent_late_ms']['p99']:.2f} ms")
    shares = ", ".join(f"{share:.1%} of {name}" for name, share in found["served_share"].items())
    print(f"served: {shares}; at most {found['queue_most']:g} waiting of {found['max_queue']}")
    print("\n" + ("\n".join(f"MISSED: {goal}" for goal in found["missed"]) or "passed"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description="More requests than can be served.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--times", type=float, default=10, help="the peak (default: %(default)s)")
    parser.add_argument("--interactive", type=float, default=0.05, help="their share (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="TRIPTYCH_MAX_CONCURRENCY (default: %(default)s)")
    parser.add_argument("--queue", type=int, default=16, help="TRIPTYCH_MAX_QUEUE (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.seconds < 10 or given.times <= 1 or not 0 < given.interactive < 1:
        parser.error("--seconds must be 10 or more, --times more than 1, and --interactive between 0 and 1")
    settings = {"TRIPTYCH_MAX_CONCURRENCY": str(given.concurrency), "TRIPTYCH_MAX_QUEUE": str(given.queue)}
    echo = declaration(NAME, echo_tokens_per_s=PACE, max_running=1024)
    with processes.terminated_as_exit(), tempfile.TemporaryDirectory(prefix="triptych-overload-") as folder:
        try:
            with serving(Path(folder), [echo], environ=settings) as served:
                found = uvloop.run(measure(served, given))
        except processes.StartError as error:
            print(f"bench.overload: {error}", file=sys.stderr)
            return 1
    print_found(found)
    print(json_line(found))
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
