"""What every response has, whatever answered: x-request-id, Server-Timing, and a body even for a bug.

Knows no route. It does nothing for a chunk of a body.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.connection import header
from gateway.errors import ClientGone, error_response
from observability import logs

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContext:
    """Gives each request its id (the client's own, if it is a sane one) and its timings."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = time.perf_counter()
        given = header(scope, b"x-request-id")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{os.urandom(16).hex()}"
        logs.about(request_id=request_id)
        timings: dict[str, float] = {}
        state = scope["state"]
        state["request_id"] = request_id
        state["timings"] = timings
        headers: list[tuple[bytes, bytes]] = []
        state["headers"] = headers
        started = False

        def send_with_context(message: Message) -> Awaitable[None]:  # not a coroutine: that costs each chunk
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                timings["total"] = (time.perf_counter() - began) * 1000
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"server-timing", server_timing(timings)),
                    *headers,
                ]
            return send(message)

        try:
            await self.app(scope, receive, send_with_context)
        except ClientGone:
            return
        except Exception as error:
            response = error_response(error, request_id)  # logs it
            if not started:
                await response(scope, receive, send_with_context)


def server_timing(timings: dict[str, float]) -> bytes:
    """W3C Server Timing: `name;dur=milliseconds`, comma-separated."""
    return ", ".join(f"{name};dur={ms:.1f}" for name, ms in timings.items()).encode()
