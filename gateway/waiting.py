"""What a stream's client hears while its pipeline is not ready: the headers at once, and then how far it is.

Knows neither who waits for what nor what becomes of it. Comments are server-sent events' own: a client
that does not look for them does not see them (WHATWG HTML, 9.2.6: a line that begins with a colon).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.types import Message, Send

from gateway.lifecycle.driver import Progress
from gateway.sse import HEADERS

HEADERS_S = 0.05  # what is ready by then has its headers with its first words
COMMENT_S = 2.0  # between two comments; a proxy may give up on a connection that is silent for longer
FIRST_COMMENT_S = 0.5  # after the headers


class Opened:
    """`send` of a stream, whose headers may have gone out before its answer begins."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.opened = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self.opened:
                return
            self.opened = True
        await self._send(message)

    @property
    def or_bare(self) -> Send:
        """For all that follows: itself only where it has still something to hold back."""
        return self if self.opened else self._send

    async def comment(self, text: str) -> None:
        await self({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await self({"type": "http.response.body", "body": f": {text}\n\n".encode(), "more_body": True})


async def while_loading(turn: Coroutine[Any, Any, None], send: Opened, progress: Callable[[], Progress]) -> None:
    """Until the turn has come, or raises what it raised."""
    began = time.monotonic()
    waiting = asyncio.ensure_future(turn)
    try:
        pause = HEADERS_S
        while not (await asyncio.wait((waiting,), timeout=pause))[0]:
            pause = COMMENT_S if send.opened else FIRST_COMMENT_S
            await send.comment(comment(progress()))
        waiting.result()
        if send.opened:
            await send.comment(f"ready: cold_start_ms={1000 * (time.monotonic() - began):.0f}")
    finally:
        if not waiting.done():
            waiting.cancel()
            await asyncio.wait((waiting,))


def comment(progress: Progress) -> str:
    return f"not ready yet: stage={progress.stage} fraction={progress.fraction:.2f} eta_s={progress.eta_s:.1f}"
