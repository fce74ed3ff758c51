"""The engine alone, in this process: tokens a second of decoding, and the time of a prompt.

    python -m bench.engine --dtypes float32,auto

Knows no Triton and no HTTP. The dtypes take turns in every round, and the medians are printed: a table, then one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict

from pipelines.engine import Request
from pipelines.engine.batched import BatchedEngine
from pipelines.engine.weights import load
from pipelines.pipeline import DEFAULT, get_pipeline
from pipelines.sampling import Sampling
from pipelines.sources import pull

STREAMS = (1, 8, 16)
PROMPTS = (40, 1000)
STEPS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=DEFAULT)
    parser.add_argument("--dtypes", default="float32,auto")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    home = pull(get_pipeline(asked.pipeline))
    engines, found = {}, defaultdict(list)
    for dtype in asked.dtypes.split(","):
        started = time.perf_counter()
        model, limits = load(home, dtype=dtype)
        found[dtype, "load s"].append(time.perf_counter() - started)
        engines[dtype] = BatchedEngine(model, limits)
    for _ in range(asked.rounds):
        for dtype, engine in engines.items():
            for streams in STREAMS:
                found[dtype, f"{streams} streams, tokens/s"].append(decode(engine, streams))
            for length in PROMPTS:
                found[dtype, f"prompt of {length}, s"].append(prefill(engine, length))
    medians = {f"{dtype}: {what}": round(statistics.median(values), 3) for (dtype, what), values in found.items()}
    for name, value in medians.items():
        print(f"{name:<40}{value:>10}")
    print(json.dumps(medians))


def decode(engine: BatchedEngine, streams: int) -> float:
    """Tokens a second of all streams, each of some 50 positions."""
    submit(engine, streams, length=40)
    for _ in range(5):  # a step admits 512 tokens of prompts: 12 streams
        engine.step()
    started = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    seconds = time.perf_counter() - started
    clear(engine, streams)
    return streams * STEPS / seconds


def prefill(engine: BatchedEngine, length: int) -> float:
    """Seconds to the first token of one prompt."""
    submit(engine, 1, length)
    started = time.perf_counter()
    engine.step()
    seconds = time.perf_counter() - started
    clear(engine, 1)
    return seconds


def submit(engine: BatchedEngine, streams: int, length: int) -> None:
    for stream in range(streams):
        input_ids = [100 + stream + 37 * place % 5000 for place in range(length)]
        engine.submit(Request(str(stream), input_ids, Sampling(max_tokens=200, temperature=0)))


def clear(engine: BatchedEngine, streams: int) -> None:
    for stream in range(streams):
        engine.cancel(str(stream))
    while engine.busy:
        engine.step()


if __name__ == "__main__":
    main()
