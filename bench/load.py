"""Load on any OpenAI endpoint: first token, time between events, throughput, errors by kind.

    python -m bench.load --url http://127.0.0.1:8080/v1 --model NAME --concurrency 16 --requests 200
    python -m bench.load --model NAME --of-bare-engine 5

The second measures, in so many turns, the server's streams and the bare engine's, and says how much of it is kept.
"""

from __future__ import annotations

import argparse
import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import uvloop

from bench import processes
from bench.client import Endpoint, Result
from bench.drive import drive
from bench.report import json_line, milliseconds, table

DEFAULT_PROMPT = "Write a short story about a lighthouse keeper."


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
    parser.add_argument("--concurrency", type=int, help="requests at a time (default: 1; with --of-bare-engine 16)")
    parser.add_argument("--requests", type=int, help="(default: 10)")
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
    parser.add_argument("--of-bare-engine", type=int, metavar="ROUNDS", help="in turns with the engine alone")
    given = parser.parse_args(arguments)
    concurrency = (16 if given.of_bare_engine else 1) if given.concurrency is None else given.concurrency
    requests = 10 if given.requests is None else given.requests
    if concurrency < 1 or requests < 1:
        parser.error("--concurrency and --requests must be 1 or more")
    try:
        endpoint = Endpoint(given.url, given.api_key)
    except ValueError as error:
        parser.error(str(error))
    if given.of_bare_engine is not None:
        return _of_bare_engine(parser, given, endpoint, concurrency)

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
            concurrency=concurrency,
            requests=requests,
            timeout=given.timeout,
        )
    )
    found = summary(results, seconds)
    print_summary(found)
    print(json_line(found))
    return 0 if found["succeeded"] else 1


def _of_bare_engine(
    parser: argparse.ArgumentParser, given: argparse.Namespace, endpoint: Endpoint, concurrency: int
) -> int:
    from bench import of_bare  # here, because any endpoint can be loaded without a catalog

    if given.of_bare_engine < 1:
        parser.error("--of-bare-engine must be 1 or more")
    for name in ("requests", "temperature"):
        if getattr(given, name) is not None:
            parser.error(f"--{name} does not go with --of-bare-engine, which asks for the same of both")
    if given.prompt != DEFAULT_PROMPT or not given.stream or not given.usage or given.completions:
        parser.error("--prompt, --completions, --no-stream and --no-usage do not go with --of-bare-engine")
    with processes.terminated_as_exit():
        return of_bare.report(
            endpoint,
            given.model,
            streams=concurrency,
            tokens=given.max_tokens,
            turns=given.of_bare_engine,
            timeout=given.timeout,
        )


if __name__ == "__main__":
    raise SystemExit(main())
