"""How much of the bare engine's decoding a server keeps: both measured in turns, on one machine, the other idle.

Knows how to ask a server for streams and how to start the engine's process; not where the server runs. The prompts have
the same words and length, and on both sides only the time counts in which all streams decode.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import uvloop

from bench import prompts, rounds
from bench.client import Endpoint, Result
from bench.contest import SETTLE_S
from bench.drive import drive
from bench.peers import Peer, PeerError
from bench.report import json_line, median, table
from pipelines.pipeline import get_pipeline
from pipelines.sources import pull

WORDS = 40


def report(endpoint: Endpoint, model: str, *, streams: int, tokens: int, turns: int, timeout: float) -> int:
    """Prints a table and the JSON line; the exit code. `model` is a pipeline of this machine's catalog too."""
    try:
        found = compare(endpoint, model, streams=streams, tokens=tokens, turns=turns, timeout=timeout)
    except PeerError as error:
        print(f"bench.load: {error}", file=sys.stderr)
        return 1
    rows = [[name, found[name]["tokens_per_s"]] for name in ("server", "bare_engine")]
    print(table([f"{streams} streams", "tokens/s"], rows))
    print(f"\nthe server keeps {found['of_bare_engine']:.2f} of the bare engine")
    print(json_line(found))
    return 0


def compare(endpoint: Endpoint, model: str, *, streams: int, tokens: int, turns: int, timeout: float) -> dict[str, Any]:
    pipeline = get_pipeline(model)
    home = pull(pipeline)
    served: list[float] = []
    bare: list[float] = []
    engine = Peer("bare engine", "bench.engine_worker", threads=len(os.sched_getaffinity(0)))
    try:
        engine.load(
            home=str(home), dtype=pipeline.dtype, threads=len(os.sched_getaffinity(0)), streams=pipeline.max_running
        )
        length = 0
        for turn in range(-1, turns):  # the first is a warm-up
            results = uvloop.run(_ask(endpoint, model, streams, tokens, turn, timeout))
            length = round(statistics.mean(result.prompt_tokens or WORDS for result in results))
            rate = throughput(results)
            measure = rounds.Measure(f"decode_{streams}", streams, length, tokens)
            if turn < 0:
                engine.measure(measure, prompts.of_words(home / "tokenizer.json"), "warm")
                engine.settle(SETTLE_S)
                continue
            served.append(rate)
            bare.append(engine.measure(measure, prompts.of_words(home / "tokenizer.json"), f"round {turn}"))
    finally:
        engine.close()
    series, other = {"decode": served}, {"decode": bare}
    return {
        "of_bare_engine": rounds.ratios(series, other)["decode"],
        "spread": rounds.spreads(series, other)["decode"],
        "server": {"tokens_per_s": median(served)},
        "bare_engine": {"tokens_per_s": median(bare), **engine.info},
        "streams": streams,
        "prompt_tokens": length,
        "tokens": tokens,
        "rounds": turns,
    }


def throughput(results: Sequence[Result]) -> float:
    """Tokens a second while all decode. A stream's tokens are spread evenly over the arrivals of its text."""
    if errors := Counter(result.error for result in results if result.error):
        raise PeerError(f"the server failed {errors.total()} of {len(results)} requests: {dict(errors)}")
    times = [list(accumulate(result.gaps, initial=result.first or 0.0)) for result in results]
    weights = [(result.tokens or result.events) / len(stream) for result, stream in zip(results, times, strict=True)]
    try:
        return rounds.together(times, weights)
    except ValueError as error:
        raise PeerError(f"the server's streams: {error}") from None


async def _ask(
    endpoint: Endpoint, model: str, streams: int, tokens: int, turn: int, timeout: float
) -> Sequence[Result]:
    def body(number: int) -> Mapping[str, Any]:
        return {
            "model": model,
            "prompt": prompts.text(f"{turn} server {number}", WORDS),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    results, _ = await drive(endpoint, "/completions", body, concurrency=streams, requests=streams, timeout=timeout)
    return results
