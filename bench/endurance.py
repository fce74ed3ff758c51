"""Minutes of mixed traffic at the whole product: nothing may hang, fail, or grow.

Short and long streams, of both kinds of event, unary calls, clients that leave midway, and direct gRPC calls.
Knows where to send and what to watch; `bench.stack` starts it all.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import processes
from bench.client import Client, Endpoint, Result
from bench.direct import Direct

SAMPLE_S = 5
WARM_S = 60
GROWTH = 0.05
GROWTH_BYTES = 8 * 2**20


@dataclass
class Traffic:
    """What `streams` callers do until the time is up."""

    endpoint: Endpoint
    direct: Direct
    token_pipeline: str
    message_pipeline: str
    prompt: str
    timeout_s: float = 60
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)

    async def run(self, streams: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        await asyncio.gather(*(self._caller(random.Random(number), deadline) for number in range(streams)))

    async def _caller(self, chance: random.Random, deadline: float) -> None:
        client = Client(self.endpoint)
        kinds = {
            "token stream": 40,
            "message stream": 25,
            "unary": 10,
            "leaver": 15,
            "ensemble": 5,
            "direct": 5,
        }
        while time.monotonic() < deadline:
            (kind,) = chance.choices(list(kinds), list(kinds.values()))
            long = chance.random() < 0.25
            tokens = chance.randint(500, 3000) if long else chance.randint(1, 32)
            result = await self._request(client, kind, tokens, chance)
            self.outcomes[kind] += 1
            if problem := _problem(kind, result, tokens):
                self.problems[f"{kind}: {problem}"] += 1
        client.close()

    async def _request(self, client: Client, kind: str, tokens: int, chance: random.Random) -> Result:
        if kind == "ensemble":
            return await self.direct.ensemble(self.message_pipeline, self.prompt, tokens, self.timeout_s)
        if kind == "direct":
            return await self.direct.orchestrator(self.message_pipeline, self.prompt, tokens, self.timeout_s)
        per_token = kind == "token stream" or (kind == "leaver" and chance.random() < 0.5)
        body: dict[str, Any] = {
            "model": self.token_pipeline if per_token else self.message_pipeline,
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": tokens,
            "stream": kind != "unary",
        }
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        leave_after = chance.randint(1, max(1, tokens // 2)) if kind == "leaver" else None
        return await client.post("/chat/completions", body, timeout=self.timeout_s, leave_after=leave_after)


def _problem(kind: str, result: Result, tokens: int) -> str | None:
    """Why this was not the answer that was asked for."""
    if result.error or kind == "leaver":
        return result.error
    if result.finish_reason != "length":
        return f"finish_reason {result.finish_reason}"
    counted = kind in ("token stream", "message stream", "unary")
    return "wrong number of tokens" if counted and result.tokens != tokens else None


class Memory:
    """Samples of what the product's processes hold."""

    def __init__(self, root: int) -> None:
        self._root = root
        self.samples: list[tuple[float, dict[str, int]]] = []

    async def watch(self) -> None:
        began = time.monotonic()
        while True:
            pids = await asyncio.to_thread(processes.tree, self._root)
            sample = processes.resident(pids)
            sample["/dev/shm"] = processes.shared_memory(pids)
            self.samples.append((time.monotonic() - began, sample))
            await asyncio.sleep(SAMPLE_S)


def verdict(samples: Sequence[tuple[float, Mapping[str, int]]]) -> dict[str, Any]:
    """Each process after the warm-up minute (a third of a shorter run) against the end."""
    last = samples[-1][0]
    warm = next(sample for at, sample in samples if at >= min(WARM_S, last / 3))
    end = samples[-1][1]
    rows = {}
    for name in sorted({*warm, *end}):
        before, after = warm.get(name), end.get(name)
        if before is None or after is None:  # a process that came or went
            rows[name] = {"warm_mib": _mib(before), "end_mib": _mib(after), "flat": False}
            continue
        flat = after - before <= max(before * GROWTH, GROWTH_BYTES)
        rows[name] = {"warm_mib": _mib(before), "end_mib": _mib(after), "flat": flat}
    return {"memory": rows, "flat": all(row["flat"] for row in rows.values())}


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20
