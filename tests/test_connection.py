"""A client that leaves ends the work that is done for it, whatever that work does with its cancellation."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.connection import while_connected
from gateway.errors import ClientGone


def test_a_cancellation_that_is_lost_is_repeated() -> None:
    """asyncio.wait_for loses one that meets the end of what it waits for, until Python 3.12."""
    lost = 0

    async def work() -> None:
        nonlocal lost
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            lost += 1
        await asyncio.sleep(60)

    async def left() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def main() -> None:
        with pytest.raises(ClientGone):
            await asyncio.wait_for(while_connected(left, work()), 20)

    asyncio.run(main())
    assert lost == 1
