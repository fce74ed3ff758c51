"""Triton's own metrics, passed on: `/metrics/triton`, so that whoever scrapes the gateway needs no other address.

Of several Tritons the first's, or with `?endpoint=HOST:PORT` that one's: together their series would be one another's.

Knows Triton's port, which is the one above its gRPC, and reads it over a bare socket: a scrape that hangs is ended.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from gateway.settings import Settings
from gateway.state import state_of
from gateway.within import within
from pipelines.errors import StageError

TIMEOUT_S = 3.0
_MOST_BYTES = 16 * 1024 * 1024
_REQUEST = b"GET /metrics HTTP/1.0\r\nHost: triton\r\n\r\n"  # 1.0: the answer ends with the connection, unchunked


async def triton_metrics(request: Request) -> Response:
    host, port = _address(state_of(request.scope)["settings"], request.query_params.get("endpoint", ""))
    try:
        body = await within(TIMEOUT_S, _read(host, port))
    except asyncio.TimeoutError:
        raise _away(f"no answer within {TIMEOUT_S:g} s") from None
    except (OSError, ValueError) as error:
        raise _away(str(error)) from None
    return Response(body, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})


def _address(settings: Settings, endpoint: str) -> tuple[str, int]:
    targets = settings.tritons or [settings.triton_grpc]
    if endpoint and endpoint not in targets:
        raise StageError(f"'endpoint' must be one of: {', '.join(targets)}.", param="endpoint")
    host, _, port = (endpoint or targets[0]).rpartition(":")
    return host.strip("[]"), int(port) + 1


async def _read(host: str, port: int) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(_REQUEST)
        answer = bytearray()
        while block := await reader.read(1 << 16):
            answer += block
            if len(answer) > _MOST_BYTES:
                raise ValueError(f"more than {_MOST_BYTES} bytes")
    finally:
        writer.close()
    head, found, body = bytes(answer).partition(b"\r\n\r\n")
    status = head.split(b"\r\n")[0].split(b" ")[1:2]
    if not found or status != [b"200"]:
        raise ValueError(f"it answered {head[:80]!r}")
    return body


def _away(why: str) -> StageError:
    return StageError(f"Triton's metrics cannot be read: {why}.", code="unavailable")
