"""The baseline: what a bare Starlette app can stream on this machine, with no model and no Triton behind it.

    python -m bench.bare_sse --port 9000

It sends the gateway's own bytes, one event a token, through the same uvicorn, uvloop and httptools, and knows
the answer already: it is what the way of writing events costs, without anything to write about.

Under /v1 a stream never waits for anything, so several are in truth sent one after another: the most events
in a second, and first tokens as late as all the other streams are long. Under /fair/v1 streams take turns, as
those of a real server do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

_ID, _CREATED, _MODEL = "chatcmpl-0123456789abcdef0123456789abcdef", 1_700_000_000, "echo-bench"


def chunk(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    """One event of a chat completion's stream."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    body = {
        "id": _ID,
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": _MODEL,
        "choices": [choice],
    }
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


FIRST = chunk({"role": "assistant", "content": ""})
TOKEN = chunk({"content": " word"})
LAST = chunk({}, "length")
DONE = b"data: [DONE]\n\n"


async def chat(request: Request) -> StreamingResponse:
    max_tokens = int((await request.json())["max_tokens"])

    fair = request.url.path.startswith("/fair/")

    async def events() -> AsyncIterator[bytes]:
        yield FIRST
        for _ in range(max_tokens):
            if fair:
                await asyncio.sleep(0)
            yield TOKEN
        yield LAST
        yield DONE

    return StreamingResponse(events(), media_type="text/event-stream")


async def ready(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ready"})


app = Starlette(
    routes=[
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/fair/v1/chat/completions", chat, methods=["POST"]),
        Route("/health/ready", ready, methods=["GET"]),
    ]
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bare_sse", description="A bare SSE server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    given = parser.parse_args(arguments)
    uvicorn.run(
        app,
        host=given.host,
        port=given.port,
        loop="uvloop",
        http="httptools",
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
