"""Requests to one endpoint, so many at a time. Knows neither what they ask nor what is made of the results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.client import Client, Endpoint, Result


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
