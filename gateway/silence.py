"""To be told that nothing was heard for so many seconds. One timer however much is heard: a lane brings thousands of
messages a second, and a wait of its own for each took a tenth of the gateway's time at 400.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Silence:
    """Calls `fallen` once, when it has lasted, unless it is closed before."""

    def __init__(self, seconds: float, fallen: Callable[[], object]) -> None:
        self.has_fallen = False
        self._seconds = seconds
        self._fallen = fallen
        self._heard = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def broken(self) -> None:
        self._heard = time.monotonic()

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left = self._heard + self._seconds - time.monotonic()
        if left > 0:
            self._timer = asyncio.get_running_loop().call_later(left, self._look)
            return
        self.has_fallen = True
        self._fallen()
