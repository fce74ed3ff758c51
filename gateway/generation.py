"""The endpoints that generate: a request from its body to its last byte. Knows no Triton, names no span."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway import objects, protocol
from gateway.backend import Submission
from gateway.choices import Choice, Merged, ParsedChoice, Totals
from gateway.connection import header, read_body, too_large, while_connected
from gateway.errors import ApiError, Failure, failure_of, log_failure
from gateway.objects import Head
from gateway.protocol import GenerationRequest, Operation
from gateway.report import Report
from gateway.retry import RetriedStream, Retry, when_ready
from gateway.room import Share
from gateway.sse import Events, Written, write_stream
from gateway.state import state_of
from pipelines.answer.formats import AnswerFormat
from pipelines.errors import StageError
from pipelines.messages import check_count, image_parts
from pipelines.terms import Terms

TIMEOUT_HEADER = "x-request-timeout-ms"
_LARGE_BODY = 1024 * 1024
_TRACED_CHOICES = 2  # whose stages are in the trace: with all of them it would not fit on a screen
_PROCESS = os.urandom(4).hex()
_COUNT = itertools.count()


class Generation:
    """The ASGI endpoint of one operation."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = state_of(scope)
        began = time.monotonic()
        with Report(scope, self.operation) as report, state["room"].share() as share:
            timeout_ms = _timeout_ms(scope, state["settings"].max_timeout_ms)
            request = await self._request(scope, receive, share)
            report.served(request)
            deadline = _Deadline(Terms(request.priority, timeout_ms), began)
            await while_connected(receive, self._serve(request, deadline, report, scope, receive, send))

    async def _request(self, scope: Scope, receive: Receive, share: Share) -> GenerationRequest:
        """Read, parsed, and possible for the pipeline that it names."""
        settings, pipelines = state_of(scope)["settings"], state_of(scope)["backend"].pipelines()
        limit, setting = settings.max_body_bytes, "TRIPTYCH_MAX_BODY_BYTES"
        if any(pipeline.takes_images for pipeline in pipelines.values()):
            limit, setting = limit + settings.max_image_bytes, f"{setting} and TRIPTYCH_MAX_IMAGE_BYTES"
        body = await read_body(scope, receive, limit, setting, share)
        # To parse tens of megabytes takes tens of milliseconds, in which nobody else would be served.
        parse = asyncio.to_thread if len(body) > _LARGE_BODY else _at_once
        request = await parse(protocol.parse_request, self.operation, body, settings.max_choices)
        pictures = sum(len(image.url) for image in image_parts(request.messages))
        if len(body) - pictures > settings.max_body_bytes:
            what = "The request body without its pictures"
            raise too_large(what, settings.max_body_bytes, "TRIPTYCH_MAX_BODY_BYTES")
        if request.model not in pipelines:
            raise model_not_found(request.model)
        check_count(request.messages, pipelines[request.model].max_images)
        return replace(request, messages=())  # its pictures are large, and need not be held twice until the answer ends

    async def _serve(
        self,
        request: GenerationRequest,
        deadline: _Deadline,
        report: Report,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        state = state_of(scope)
        admission = state["admission"]
        with report.admission(admission.depth):
            await admission.acquire(request.choices, deadline.left_s())
        try:
            head = protocol.new_head(self.operation, request.model, stream=request.stream)
            with report.generation(request, head.id) as span:
                submissions = self._submissions(request, deadline.left(), report.request_id, span.traceparent)
                backend, patience_s = state["backend"], state["settings"].accept_timeout_s
                able = when_ready(backend)
                retry = Retry(backend, able, patience_s, deadline.left, report.retried, whole=not request.stream)
                streams = await _submit(retry, submissions)
                deltas = report.heard(streams)
                try:
                    choices = self._choices(request, state["formats"].of(backend.pipelines()[request.model]))
                    if request.stream:
                        await self._stream(request, head, choices, deltas, report, send)
                    else:
                        response = await self._whole(request, head, choices, streams, deltas, report)
                        await response(scope, receive, send)
                finally:
                    deltas.cancel()
        finally:
            admission.release(request.choices)

    def _submissions(
        self, request: GenerationRequest, terms: Terms, request_id: str, traceparent: str | None
    ) -> list[Submission]:
        return [
            Submission(
                # Clients may repeat an x-request-id, even while the first is live.
                id=f"{request_id}.{_PROCESS}{next(_COUNT):x}",
                pipeline=request.model,
                inputs=inputs,
                sampling=sampling.to_json(),
                traceparent=traceparent if index < _TRACED_CHOICES else None,
                terms=terms,
            )
            for index, (inputs, sampling) in enumerate(request.asked())
        ]

    def _choices(self, request: GenerationRequest, form: AnswerFormat) -> list[Choice]:
        choices = []
        for index in range(request.choices):
            parser = form.parser(request.tools, shaped=request.shaped) if self.operation.takes_tools else None
            choices.append(ParsedChoice(self.operation, index, parser) if parser else Choice(self.operation, index))
        return choices

    async def _stream(
        self,
        request: GenerationRequest,
        head: Head,
        choices: Sequence[Choice],
        deltas: Merged,
        report: Report,
        send: Send,
    ) -> None:
        first = await deltas.accepted()  # a request that the pipeline refuses fails here, before the headers
        report.taken(first)
        report.accepted(first[0][1])

        def fail(error: Exception) -> Failure:
            failure = failure_of(error, report.request_id)
            log_failure(failure, error, report.request_id)
            return failure

        timing = report.timing if request.include_timing else None
        events = Events(self.operation, head, choices, include_usage=request.include_usage, timing=timing)
        written = Written(Totals(request.n))
        with report.writing(written):
            await write_stream(send, deltas, first, events, written, fail)

    async def _whole(
        self,
        request: GenerationRequest,
        head: Head,
        choices: Sequence[Choice],
        streams: Sequence[RetriedStream],
        deltas: Merged,
        report: Report,
    ) -> Response:
        totals = Totals(request.n)
        arrivals = await deltas.accepted()
        report.taken(arrivals)
        while True:
            for index, delta in arrivals:
                choices[index].keep(delta)
                totals.add(index, delta)
            if deltas.over:
                break
            arrivals = await deltas.next()
        report.generated(totals, min((at for stream in streams if (at := stream.first_text_at)), default=0.0))
        used = objects.usage(totals.prompt_tokens, totals.completion_tokens, totals.cached_tokens)
        told = [
            choice.whole(reason, logprobs=request.sampling.logprobs)
            for choice, reason in zip(choices, totals.finish_reasons, strict=True)
        ]
        return Response(orjson.dumps(objects.whole_response(head, told, used)), media_type="application/json")


class _Deadline:
    """What a request gave itself, counted from its first byte."""

    def __init__(self, terms: Terms, began: float) -> None:
        self._terms = terms
        self._began = began

    def left(self) -> Terms:
        """Raises StageError, `timeout`, when nothing is."""
        return self._terms.after(time.monotonic() - self._began)

    def left_s(self) -> float | None:
        timeout_ms = self.left().timeout_ms
        return None if timeout_ms is None else timeout_ms / 1000


async def _at_once(
    parse: Callable[[Operation, bytes, int], GenerationRequest], operation: Operation, body: bytes, max_choices: int
) -> GenerationRequest:
    return parse(operation, body, max_choices)


async def _submit(retry: Retry, submissions: Sequence[Submission]) -> list[RetriedStream]:
    """All of them, or none."""
    streams: list[RetriedStream] = []
    try:
        for submission in submissions:
            streams.append(await retry.submit(submission))
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    return streams


def _timeout_ms(scope: Scope, most: int) -> int | None:
    text = header(scope, TIMEOUT_HEADER.encode())
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and int(text[:20])):
        raise StageError(
            f"The header {TIMEOUT_HEADER} must be a number of milliseconds, 1 or more.", param=TIMEOUT_HEADER
        )
    return min(int(text[:20]), most)


def model_not_found(name: str) -> ApiError:
    shown = name if len(name) <= 80 else name[:77] + "..."
    return ApiError(404, f"The model '{shown}' does not exist.", code="model_not_found", param="model")
