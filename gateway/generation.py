"""The endpoints that generate: a request from its body to its last byte. Knows no Triton, names no span."""

from __future__ import annotations

import itertools
import os
import time

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway import protocol
from gateway.backend import Stream, Submission
from gateway.connection import read_body, while_connected
from gateway.errors import ApiError, Failure, failure_of, log_failure
from gateway.protocol import GenerationRequest, Head, Operation
from gateway.report import Report
from gateway.sse import Events, Written, write_stream
from gateway.state import state_of

_PROCESS = os.urandom(4).hex()
_COUNT = itertools.count()


class Generation:
    """The ASGI endpoint of one operation."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = state_of(scope)
        with Report(scope, self.operation) as report:
            body = await read_body(scope, receive, state["settings"].max_body_bytes)
            request = protocol.parse_request(self.operation, body)
            if request.model not in state["backend"].pipelines():
                raise model_not_found(request.model)
            report.served(request)
            await while_connected(receive, self._serve(request, report, scope, receive, send))

    async def _serve(
        self, request: GenerationRequest, report: Report, scope: Scope, receive: Receive, send: Send
    ) -> None:
        state = state_of(scope)
        admission = state["admission"]
        with report.admission(admission.depth):
            await admission.acquire()
        try:
            head = protocol.new_head(self.operation, request.model)
            with report.generation(request, head.id) as span:
                submission = Submission(
                    # Clients may repeat an x-request-id, even while the first is live.
                    id=f"{report.request_id}.{_PROCESS}{next(_COUNT):x}",
                    pipeline=request.model,
                    inputs=request.inputs,
                    sampling=request.sampling.to_json(),
                    traceparent=span.traceparent,
                )
                stream = await state["backend"].submit(submission)
                try:
                    if request.stream:
                        await self._stream(request, head, stream, report, send)
                    else:
                        response = await self._whole(head, stream, report)
                        await response(scope, receive, send)
                finally:
                    stream.cancel()
        finally:
            admission.release()

    async def _stream(self, request: GenerationRequest, head: Head, stream: Stream, report: Report, send: Send) -> None:
        first = await stream.next()  # a request that the pipeline refuses fails here, before the headers
        report.accepted(first)

        def fail(error: Exception) -> Failure:
            failure = failure_of(error, report.request_id)
            log_failure(failure, error, report.request_id)
            return failure

        events = Events(self.operation, head, request.include_usage)
        written = Written()
        with report.writing(written):
            await write_stream(send, stream, first, events, written, fail)

    async def _whole(self, head: Head, stream: Stream, report: Report) -> Response:
        texts: list[str] = []
        first_text_at = 0.0
        while True:
            delta = await stream.next()
            if delta.texts:
                first_text_at = first_text_at or time.perf_counter()
                texts += delta.texts
            if delta.finish_reason:
                break
        report.generated(delta, first_text_at)
        used = protocol.usage(delta.prompt_tokens, delta.completion_tokens)
        answer = protocol.whole_response(self.operation, head, "".join(texts), delta.finish_reason, used)
        return Response(orjson.dumps(answer), media_type="application/json")


def model_not_found(name: str) -> ApiError:
    shown = name if len(name) <= 80 else name[:77] + "..."
    return ApiError(404, f"The model '{shown}' does not exist.", code="model_not_found", param="model")
