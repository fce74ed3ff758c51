"""The whole product without a model's cost: gateway, Triton and the stages, with the echo engine.

    python -m bench.stack [--rounds 5] [--streams 1,16,64,256]
    python -m bench.stack --endurance 10
    python -m bench.stack --tracing

The first compares, in interleaved rounds: one event a token through the gateway, several tokens an event, a
bare Starlette server that writes the same bytes (`bench.bare_sse`, both kinds), and Triton called directly.
The second runs mixed traffic and watches for hangs, errors and growth; its exit code is 1 if it saw one. The third
compares two products, in interleaved rounds: one that keeps and exports every request's trace, one that traces nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from bench import endurance, processes
from bench.client import Endpoint, Result
from bench.direct import Direct
from bench.drive import drive
from bench.echoes import Echo, declaration, serving
from bench.report import json_line, median, percentile, shown, table

TOKEN, MESSAGE = "echo-bench", "echo-bench-message"
EVENTS = {TOKEN: "token", MESSAGE: "message"}  # what shares one, as a pipeline declares it
PROMPT = " ".join(f"word {number}" for number in range(20))
TOKENS = 100_000  # of all streams together in one measurement, as long as a stream gets no more than
MOST_TOKENS = 50_000
REQUESTS = 20  # in one measurement, at least: a first token is one sample a request
CALLS = 4  # one after the other, of each of the ensemble's callers
TIMEOUT_S = 120
SHORT = 64  # tokens of a short answer: where a trace, which has a size of its own, costs most
SHORT_REQUESTS = 300  # in one measurement

Measured = dict[str, float]


@dataclass
class Stack:
    """Where everything listens, and the process to watch."""

    gateway: str
    triton: str
    bare: str
    serve_pid: int


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Stack]:
    """The product with the two echo pipelines, and the bare server."""
    bare, bare_log = processes.free_ports(), folder / "bare.log"
    with (
        processes.running(["bench.bare_sse", "--port", str(bare)], bare_log) as bare_process,
        serving(folder, [_echo(TOKEN), _echo(MESSAGE)]) as served,
    ):
        processes.wait_ready(bare_process, f"http://127.0.0.1:{bare}/health/ready", bare_log, 30)
        yield Stack(served.url, served.triton, f"http://127.0.0.1:{bare}", served.pid)


def _echo(name: str) -> Echo:
    return declaration(name, max_running=1024, context=2 * MOST_TOKENS, stream_event=EVENTS[name])


async def http_streams(
    base: str, model: str, streams: int, tokens: int, *, usage: bool = False, requests: int = REQUESTS
) -> Measured:
    """`streams` at once, `requests` in all or more. Counts tokens by `usage`, or else events, of which a token without
    text (the chat template's markers, echoed) has none."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": tokens,
        "stream": True,
    }
    if usage:
        body["stream_options"] = {"include_usage": True}
    results, seconds = await drive(
        Endpoint(base),
        "/chat/completions",
        lambda number: body,
        concurrency=streams,
        requests=max(streams, requests),
        timeout=TIMEOUT_S,
    )
    _check(results)
    counts = {(result.tokens or 0) if usage else result.events for result in results}
    if len(counts) != 1 or not 0.8 * tokens <= max(counts) <= tokens:
        raise RuntimeError(f"streams of {tokens} tokens brought {sorted(counts)}")
    return _measured(results, seconds, counts.pop())


async def direct_calls(
    call: Callable[[str, str, int, float], Awaitable[Result]], callers: int, tokens: int, calls: int
) -> Measured:
    """`callers` at once, `calls` one after the other each, on Triton without the gateway."""
    results: list[Result] = []

    async def caller() -> None:
        for _ in range(calls):
            results.append(await call(TOKEN, PROMPT, tokens, TIMEOUT_S))

    started_at = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    seconds = time.perf_counter() - started_at
    _check(results)
    return _measured(results, seconds, tokens)


def _measured(results: Sequence[Result], seconds: float, tokens: int) -> Measured:
    first = [result.first - result.started for result in results if result.first is not None]
    return {
        "tokens_per_s": len(results) * tokens / seconds,
        "requests_per_s": len(results) / seconds,
        "first_p50": percentile(first, 50) * 1000,
        "first_p99": percentile(first, 99) * 1000,
        "request_p50": percentile([result.ended - result.started for result in results], 50) * 1000,
    }


def _check(results: Sequence[Result]) -> None:
    """A measurement of wrong answers is none."""
    errors = Counter(result.error for result in results if result.error)
    if errors:
        raise RuntimeError(f"{sum(errors.values())} of {len(results)} requests failed: {dict(errors)}")
    reasons = {result.finish_reason for result in results}
    if reasons != {"length"}:
        raise RuntimeError(f"finish_reason should be 'length', not {reasons}")


async def compare(stack: Stack, streams: Sequence[int], rounds: int) -> dict[str, Any]:
    """Medians over interleaved rounds."""
    direct = Direct(stack.triton)
    seen: dict[str, dict[int, list[Measured]]] = {}
    try:
        for turn in range(-1, rounds):  # the first is a warm-up; every other is in reverse order
            for count in streams:
                tokens = min(MOST_TOKENS, TOKENS // max(count, REQUESTS))
                series: dict[str, Callable[[], Awaitable[Measured]]] = {
                    "bare": partial(http_streams, stack.bare + "/v1", TOKEN, count, tokens),
                    "token": partial(http_streams, stack.gateway + "/v1", TOKEN, count, tokens),
                    "fair": partial(http_streams, stack.bare + "/fair/v1", TOKEN, count, tokens),
                    "message": partial(http_streams, stack.gateway + "/v1", MESSAGE, count, tokens, usage=True),
                    "ensemble": partial(direct_calls, direct.ensemble, count, tokens // CALLS, CALLS),
                    "orchestrator": partial(direct_calls, direct.orchestrator, count, tokens, 1),
                }
                for name, measure in (list if turn % 2 else reversed)(series.items()):
                    measured = await measure()
                    if turn >= 0:
                        seen.setdefault(name, {}).setdefault(count, []).append(measured)
            print("warm" if turn < 0 else f"round {turn + 1} of {rounds}", file=sys.stderr)
    finally:
        await direct.close()
    return _result(seen, streams)


def _result(seen: dict[str, dict[int, list[Measured]]], streams: Sequence[int]) -> dict[str, Any]:
    def over(name: str, count: int, key: str) -> float:
        return median([measured[key] for measured in seen[name][count]])

    def ratio(count: int, other: str) -> float:
        rounds = zip(seen["token"][count], seen[other][count], strict=True)
        return median([ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in rounds])

    result: dict[str, Any] = {"streams": {}, "ensemble": {}, "orchestrator": {}}
    for count in streams:
        result["streams"][str(count)] = {
            "tokens_per_s": over("token", count, "tokens_per_s"),
            "bare_sse_per_s": over("bare", count, "tokens_per_s"),
            "ratio_to_bare_sse": ratio(count, "bare"),
            "fair_bare_sse_per_s": over("fair", count, "tokens_per_s"),
            "ratio_to_fair_bare_sse": ratio(count, "fair"),
            "first_token_ms": {p: over("token", count, f"first_{p}") for p in ("p50", "p99")},
            "bare_first_token_ms": {p: over("bare", count, f"first_{p}") for p in ("p50", "p99")},
            "fair_first_token_ms": {p: over("fair", count, f"first_{p}") for p in ("p50", "p99")},
            "normal_tokens_per_s": over("message", count, "tokens_per_s"),
            "normal_first_token_ms": {p: over("message", count, f"first_{p}") for p in ("p50", "p99")},
        }
        for model in ("ensemble", "orchestrator"):
            result[model][str(count)] = {
                "tokens_per_s": over(model, count, "tokens_per_s"),
                "requests_per_s": over(model, count, "requests_per_s"),
                "request_p50_ms": over(model, count, "request_p50"),
            }
        result["orchestrator"][str(count)]["first_token_ms"] = {
            p: over("orchestrator", count, f"first_{p}") for p in ("p50", "p99")
        }
    return result


def print_comparison(result: dict[str, Any]) -> None:
    head = [
        "streams",
        "event a token",
        "bare",
        "ratio",
        "fair bare",
        "ratio",
        "normal",
        "ensemble",
        "orchestrator",
    ]
    rows = [
        [
            count,
            row["tokens_per_s"],
            row["bare_sse_per_s"],
            f"{row['ratio_to_bare_sse']:.2f}",
            row["fair_bare_sse_per_s"],
            f"{row['ratio_to_fair_bare_sse']:.2f}",
            row["normal_tokens_per_s"],
            result["ensemble"][count]["tokens_per_s"],
            result["orchestrator"][count]["tokens_per_s"],
        ]
        for count, row in result["streams"].items()
    ]
    print("tokens a second\n" + table(head, rows))
    names = {
        "event a token": "first",
        "bare": "bare_first",
        "fair bare": "fair_first",
        "normal": "normal_first",
    }
    rows = [
        [
            count,
            *(_pair(row[f"{name}_token_ms"]) for name in names.values()),
            _pair(result["orchestrator"][count]["first_token_ms"]),
        ]
        for count, row in result["streams"].items()
    ]
    print("\nfirst token, ms (p50 / p99)\n" + table(["streams", *names, "orchestrator"], rows))


def _pair(latency: dict[str, float]) -> str:
    return f"{shown(latency['p50'])} / {shown(latency['p99'])}"


@contextlib.contextmanager
def traced_and_not(folder: Path) -> Iterator[dict[str, str]]:
    """Two products: one exports every request's trace, to a collector that throws it away."""
    port, log = processes.free_ports(), folder / "collector.log"
    collector = f"http://127.0.0.1:{port}"
    clean = {key: "" for key in os.environ if key.startswith("OTEL_")}
    traced = {**clean, "OTEL_EXPORTER_OTLP_ENDPOINT": collector, "OTEL_TRACES_SAMPLER": "always_on"}
    with processes.running(["bench.collector", "--port", str(port)], log) as process:
        processes.wait_ready(process, collector, log, 30)
        with (
            serving(folder, [_echo(TOKEN)], environ=traced) as one,
            serving(folder, [_echo(TOKEN)], environ={**clean, "OTEL_SDK_DISABLED": "true"}) as other,
        ):
            yield {"traced": one.url, "untraced": other.url}
        with urllib.request.urlopen(collector, timeout=10) as response:
            if not int(response.read()):
                raise RuntimeError("nothing was exported: this compared nothing")


async def compare_tracing(gateways: dict[str, str], streams: Sequence[int], rounds: int) -> dict[str, Any]:
    """Medians over interleaved rounds, of long answers and of short ones; the ratios are by round."""
    seen: dict[str, dict[str, list[float]]] = {}
    for turn in range(-1, rounds):  # the first is a warm-up; every other is in reverse order
        for count in streams:
            loads = {
                "long": (min(MOST_TOKENS, TOKENS // max(count, REQUESTS)), REQUESTS),
                "short": (SHORT, SHORT_REQUESTS),
            }
            for length, (tokens, requests) in loads.items():
                for name, gateway in (list if turn % 2 else reversed)(gateways.items()):
                    measured = await http_streams(gateway + "/v1", TOKEN, count, tokens, requests=requests)
                    if turn >= 0:
                        rates = seen.setdefault(f"{length}, {count}", {})
                        rates.setdefault(name, []).append(measured["tokens_per_s"])
        print("warm" if turn < 0 else f"round {turn + 1} of {rounds}", file=sys.stderr)
    return {
        "tracing": {
            load: {
                **{f"{name}_tokens_per_s": median(values) for name, values in rates.items()},
                "ratio": median([a / b for a, b in zip(rates["traced"], rates["untraced"], strict=True)]),
            }
            for load, rates in seen.items()
        }
    }


def print_tracing(result: dict[str, Any]) -> None:
    rows = [
        [load, row["traced_tokens_per_s"], row["untraced_tokens_per_s"], f"{row['ratio']:.2f}"]
        for load, row in result["tracing"].items()
    ]
    print("tokens a second\n" + table(["answers, streams", "every request traced", "none", "ratio"], rows))


async def endure(stack: Stack, minutes: float, streams: int) -> dict[str, Any]:
    """The findings of minutes of mixed traffic."""
    direct = Direct(stack.triton)
    traffic = endurance.Traffic(Endpoint(stack.gateway + "/v1"), direct, TOKEN, MESSAGE, PROMPT)
    memory = endurance.Memory(stack.serve_pid)
    watcher = asyncio.create_task(memory.watch())
    try:
        await traffic.run(streams, minutes * 60)
        await asyncio.sleep(endurance.SAMPLE_S + 1)  # a last sample, after the last request
    finally:
        watcher.cancel()
        await direct.close()
    left = await asyncio.to_thread(_in_flight, stack.gateway)
    hangs = sum(count for problem, count in traffic.problems.items() if problem.endswith("timeout"))
    judged = endurance.verdict(memory.samples)
    return {
        "minutes": minutes,
        "streams": streams,
        "requests": dict(traffic.outcomes),
        "hangs": hangs,
        "problems": dict(traffic.problems),
        "left_in_flight": left,
        **judged,
        "passed": not traffic.problems and judged["flat"] and not left,
    }


def _in_flight(gateway: str) -> float | None:
    """What the gateway still counts as under way; None if it does not say."""
    try:
        with urllib.request.urlopen(f"{gateway}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
    except OSError:
        return None
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("triptych_requests_in_flight{"))


def print_endurance(found: dict[str, Any]) -> None:
    rows = [
        [
            name,
            *("-" if row[key] is None else float(row[key]) for key in ("warm_mib", "end_mib")),
            row["flat"],
        ]
        for name, row in found["memory"].items()
    ]
    print(table(["MiB", "after warm-up", "end", "flat"], rows))
    requests = sum(found["requests"].values())
    print(f"\n{requests} requests, {found['hangs']} hangs, problems: {found['problems'] or 'none'}")
    print("passed" if found["passed"] else "FAILED")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stack", description="The product without a model's cost.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", default="1,16,64,256", help="comma-separated (default: %(default)s)")
    parser.add_argument("--tracing", action="store_true", help="instead, every request traced beside none")
    parser.add_argument("--endurance", type=float, metavar="MINUTES", help="mixed traffic instead, watching memory")
    parser.add_argument("--endurance-streams", type=int, default=64)
    given = parser.parse_args(arguments)
    streams = [int(count) for count in given.streams.split(",")]
    if min(streams) < 1 or given.rounds < 1:
        parser.error("--streams and --rounds must be 1 or more")
    with processes.terminated_as_exit(), tempfile.TemporaryDirectory(prefix="triptych-bench-") as folder:
        try:
            if given.tracing:
                with traced_and_not(Path(folder)) as gateways:
                    found = uvloop.run(compare_tracing(gateways, streams, given.rounds))
                print_tracing(found)
            else:
                with started(Path(folder)) as stack:
                    if given.endurance:
                        found = uvloop.run(endure(stack, given.endurance, given.endurance_streams))
                        print_endurance(found)
                    else:
                        found = uvloop.run(compare(stack, streams, given.rounds))
                        print_comparison(found)
        except processes.StartError as error:
            print(f"bench.stack: {error}", file=sys.stderr)
            return 1
    print(json_line(found))
    return 0 if found.get("passed", True) else 1


if __name__ == "__main__":
    raise SystemExit(main())
