"""The client's end of an ASGI connection: its headers, its body within bounds, its leaving.

Knows nothing of what the body holds or of what is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive, Scope

from gateway.errors import ApiError, ClientGone
from gateway.room import Share


def header(scope: Scope, name: bytes) -> str:
    """The first header of that (lower-case) name, or ""."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return ""


async def read_body(scope: Scope, receive: Receive, limit: int, setting: str, share: Share) -> bytes:
    """The whole body. One announced or found to be longer than `limit` is a 413, which names the `setting` that says
    so; no more of it is read. What is read is of that `share` of the room.
    """
    encoding = header(scope, b"content-encoding").strip().lower()
    if encoding not in ("", "identity"):  # a few compressed bytes can be any number of others
        raise ApiError(
            415,
            "A compressed request body is not taken: send it without the header content-encoding.",
            code="unsupported_content_encoding",
            headers={"accept-encoding": "identity"},  # RFC 9110, 15.5.16
        )
    announced = header(scope, b"content-length")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large("The request body", limit, setting)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise too_large("The request body", limit, setting)
        share.take(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` to its end or until the client leaves: then cancels it at once, and raises ClientGone.

    In the task that it is called in, and what is refused at once, of which there may be many, needs no other.
    """
    watcher = _Watcher(receive, asyncio.current_task())
    soon = asyncio.get_running_loop().call_soon(watcher.begin)
    try:
        await work
    except asyncio.CancelledError:
        if watcher.has_seen_it_leave:
            raise ClientGone from None
        raise
    finally:
        soon.cancel()
        watcher.end()


class _Watcher:
    """Cancels the worker when the client leaves."""

    def __init__(self, receive: Receive, worker: asyncio.Task[Any] | None) -> None:
        self.has_seen_it_leave = False
        self._receive = receive
        self._worker = worker
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._task = asyncio.create_task(self._watch())

    def end(self) -> None:
        if self._task:
            self._task.cancel()
            self._task = None  # its end holds this, which would be garbage for the collector

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.has_seen_it_leave = True
        if self._worker:
            self._worker.cancel()


def too_large(what: str, limit: int, setting: str) -> ApiError:
    message = f"{what} is larger than the {limit} bytes that are taken (the server's {setting})."
    return ApiError(413, message, code="request_too_large")
