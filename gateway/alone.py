"""A request on a gRPC stream of its own: for headers, which are a whole stream's, and for answers that are no event.

Knows no lane and nothing of what is asked.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from pipelines.errors import StageError


async def alone(
    infer: Any, request: bytes, *, timeout_s: float, headers: Sequence[tuple[str, str]] = ()
) -> list[list[bytes]]:
    """The outputs of each response, until the request has ended. Raises StageError."""

    async def only() -> AsyncIterator[bytes]:
        yield request

    call = infer(only(), timeout=timeout_s, metadata=headers)
    answers = []
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            if response.error_message:
                raise StageError.from_text(response.error_message, stage="orchestrator")
            answers.append(list(response.infer_response.raw_output_contents))
    except grpc.aio.AioRpcError as error:
        code = "timeout" if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else "unavailable"
        raise StageError(f"Triton did not answer: {error.details()}", code=code, stage="orchestrator") from None
    finally:
        call.cancel()
    return answers
