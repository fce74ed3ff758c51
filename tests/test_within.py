"""Waiting with a limit: results, time that is up, and cancellations, of which none is lost."""

from __future__ import annotations

import asyncio

import pytest

from gateway.within import within


def test_what_comes_in_time_is_the_answer() -> None:
    async def failing() -> None:
        raise KeyError("it")

    async def main() -> None:
        assert await within(10, asyncio.sleep(0.001, "done")) == "done"
        assert await within(None, asyncio.sleep(0.001, "done")) == "done"
        with pytest.raises(KeyError):
            await within(10, failing())

    asyncio.run(main())


def test_what_does_not_is_cancelled_and_has_ended() -> None:
    ended: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ended.append("slow")

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, slow())
        assert ended == ["slow"]
        task = asyncio.create_task(within(60, slow()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["slow", "slow"]

    asyncio.run(main())


def test_a_cancellation_that_meets_the_end_is_not_lost() -> None:
    """asyncio.wait_for answers 1 here, until Python 3.12."""

    async def main() -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(within(60, future))
        await asyncio.sleep(0)
        future.set_result(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
