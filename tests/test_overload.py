"""Ten times what can be served, for some seconds: bounded queues, refusals that say when to come back, and service.

`python -m bench.overload` measures the same for a minute and times it; here it is seen that nothing breaks.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench.client import Endpoint
from bench.echoes import declaration, serving
from bench.overload import NAME, PACE, at_capacity, open_loop, verdict

PLACES, QUEUE, INTERACTIVE = 4, 8, 0.05
PEAK_S, OVER_S, TIMES = 4.0, 8.0, 10


@pytest.mark.usefixtures("smollm2_home")
def test_what_is_too_much_is_refused_and_what_is_not_is_served(tmp_path: Path) -> None:
    settings = {"TRIPTYCH_MAX_CONCURRENCY": str(PLACES), "TRIPTYCH_MAX_QUEUE": str(QUEUE)}
    with serving(tmp_path, [declaration(NAME, echo_tokens_per_s=PACE)], environ=settings) as served:

        async def loads() -> dict[str, object]:
            endpoint = Endpoint(served.url + "/v1")
            peak = await at_capacity(endpoint, PLACES, PEAK_S, INTERACTIVE)
            over = await open_loop(endpoint, TIMES * peak.per_s, OVER_S, INTERACTIVE, 0, served)
            return verdict(peak, over, QUEUE)

        found = asyncio.run(loads())
    assert found["failures"] == {}
    assert found["refused"] > found["goodput_per_s"] * OVER_S  # most of ten times as much
    assert found["refused_without_retry_after"] == 0
    assert 0 < found["queue_most"] <= QUEUE
    assert found["goodput_ratio"] > 0.5  # it is about 1: a gateway that only refuses has lost its way
    assert not any("grew" in goal for goal in found["missed"])
