"""To wait for something no longer than so many seconds, and to be cancelled whenever one is cancelled.

Until Python 3.12 `asyncio.wait_for` forgets that it was cancelled if that meets the end of what it waits for
(python/cpython#86296): the engine then ran on for a client that had left. `asyncio.wait` does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(seconds: float | None, work: Awaitable[T]) -> T:
    """What `work` answers or raises. Else it is cancelled, and has ended: asyncio.TimeoutError. None: for ever."""
    if seconds is None:
        return await work
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=seconds)
    finally:
        late = not task.done()
        if late:
            task.cancel()
            await asyncio.wait((task,))
    if late and task.cancelled():
        raise asyncio.TimeoutError
    return task.result()
