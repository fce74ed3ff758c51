"""Load on any OpenAI endpoint: first token, time between events, throughput, errors by kind.

python -m bench.load --url http://127.0.0.1:8080/v1 --model NAME --concurrency 16 --requests 200
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import uvloop

from bench.client import Client, Endpoint, Result
from bench.report import json_line, milliseconds, table

DEFAULT_PROMPT = "Write a short story about a lighthouse keeper."


async def drive(
    endpoint: Endpoint,
    path: str,
    body: Callable[[int], Mapping[str, Any]],
    *,
    concurrency: int,
    requests: int,
    timeout: float = 60,
) -> tuple[list[Result], float]:
    """Keeps `concurrency` requests under way until there were `requests`; the results, and the seconds."""
    results: list[Result] = []
    numbers = iter(range(requests))

    async def worker() -> None:
        client = Client(endpoint)
        for number in numbers:
            results.append(await client.post(path, body(number), timeout=timeout))
        client.close()

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(min(concurrency, requests))))
    return results, time.perf_counter() - started


def summary(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Latencies are of the requests that succeeded; throughput counts what they brought."""
    good = [result for result in results if result.error is None]
    gaps = array("d", (gap for result in good for gap in result.gaps))
    counted = [result.tokens for result in good if result.tokens is not None]
    tokens = sum(counted) if counted and len(counted) == len(good) else None
    return {
        "requests": len(results),
        "succeeded": len(good),
        "errors": dict(Counter(result.error for result in results if result.error).most_common()),
        "finish_reasons": dict(Counter(result.finish_reason or "none" for result in good).most_common()),
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "events": sum(result.events for result in good),
        "events_per_s": sum(result.events for result in good) / seconds,
        "output_tokens": tokens,
        "tokens_per_s": None if tokens is None else tokens / seconds,
        "first_token_ms": milliseconds([r.first - r.started for r in good if r.first is not None]),
        "between_events_ms": milliseconds(gaps, zeros=sum(result.together for result in good)),
        "per_output_token_ms": milliseconds([per for result in good if (per := _per_token(result)) is not None]),
        "request_ms": milliseconds([result.ended - result.started for result in good]),
    }


def _per_token(result: Result) -> float | None:
    """A request's mean time between tokens after its first, by the server's count or else by events."""
    count = result.tokens if result.tokens is not None else result.events
    if result.first is None or result.last is None or result.last == result.first or count < 2:
        return None
    return (result.last - result.first) / (count - 1)


def print_summary(found: Mapping[str, Any]) -> None:
    latencies = ("first_token_ms", "between_events_ms", "per_output_token_ms", "request_ms")
    rows = [[name.removesuffix("_ms").replace("_", " "), *found[name].values()] for name in latencies]
    print(table(["milliseconds", "p50", "p90", "p99"], rows))
    rates = [
        [name.replace("_per_s", "").replace("_", " "), found[name]]
        for name in ("requests_per_s", "events_per_s", "tokens_per_s")
        if found[name] is not None
    ]
    print("\n" + table(["per second", ""], rates))
    print(f"\n{found['succeeded']} of {found['requests']} requests succeeded in {found['seconds']:.2f} s")
    for kind, count in found["errors"].items():
        print(f"  {count} × {kind}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description="Load on any OpenAI endpoint.")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1", help="base URL (default: %(default)s)")
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--prompt", default=DEFAULT_PROMPT)
    parser.add_argument("--completions", action="store_true", help="/completions instead of /chat/completions")
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--usage",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask a stream for its token count",
    )
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one request")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    given = parser.parse_args(arguments)
    if given.concurrency < 1 or given.requests < 1:
        parser.error("--concurrency and --requests must be 1 or more")
    try:
        endpoint = Endpoint(given.url, given.api_key)
    except ValueError as error:
        parser.error(str(error))

    body: dict[str, Any] = {"model": given.model, "max_tokens": given.max_tokens, "stream": given.stream}
    if given.temperature is not None:
        body["temperature"] = given.temperature
    if given.stream and given.usage:
        body["stream_options"] = {"include_usage": True}
    if given.completions:
        body["prompt"] = given.prompt
    else:
        body["messages"] = [{"role": "user", "content": given.prompt}]
    path = "/completions" if given.completions else "/chat/completions"

    results, seconds = uvloop.run(
        drive(
            endpoint,
            path,
            lambda number: body,
            concurrency=given.concurrency,
            requests=given.requests,
            timeout=given.timeout,
        )
    )
    found = summary(results, seconds)
    print_summary(found)
    print(json_line(found))
    return 0 if found["succeeded"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
