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
from gateway.errors import ApiError, ClientGone, Failure, failure_of, failure_response, log_failure
from gateway.lifecycle.driver import Place
from gateway.lifecycle.states import State
from gateway.objects import Head
from gateway.protocol import GenerationRequest, Operation
from gateway.report import Report
from gateway.retry import RetriedStream, Retry, when_ready
from gateway.room import Share
from gateway.sse import Events, Written, write_stream
from gateway.state import state_of
from gateway.waiting import Opened, while_loading
from pipelines.answer.formats import AnswerFormat
from pipelines.errors import StageError
from pipelines.messages import check_count, image_parts
from pipelines.terms import Terms

TIMEOUT_HEADER = "x-request-timeout-ms"
TRACE_HEADER = "x-triptych-trace"
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
            opened = Opened(send)
            try:
                timeout_ms = _timeout_ms(scope, state["settings"].max_timeout_ms)
                request = await self._request(scope, receive, share)
                report.served(request)
                deadline = _Deadline(Terms(request.priority, timeout_ms), began)
                await while_connected(receive, self._serve(request, deadline, report, scope, receive, opened))
            except ClientGone:
                raise
            except Exception as error:
                # Answered before it is told: of many that are refused, each would wait for the words on it too.
                failure = _told(error, report.request_id)
                report.failed(failure, in_stream=opened.opened)
                if opened.opened:  # the headers of this stream went out while it waited
                    await send({"type": "http.response.body", "body": Events.error(failure)})
                else:
                    await failure_response(failure)(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, share: Share) -> GenerationRequest:
        """Read, parsed, and possible for the pipeline that it names."""
        settings, pipelines = state_of(scope)["settings"], state_of(scope)["backend"].pipelines()
        limit, setting = settings.max_body_bytes, "TRIPTYCH_MAX_BODY_BYTES"
        if any(pipeline.takes_images for pipeline in pipelines.values()):
            limit, setting = limit + settings.max_image_bytes, f"{setting} and TRIPTYCH_MAX_IMAGE_BYTES"
        body = await read_body(scope, receive, limit, setting, share)
        # To parse tens of megabytes takes tens of milliseconds, in which nobody else would be served.
        large = len(body) > _LARGE_BODY
        parse = asyncio.to_thread if large else _at_once
        request = await parse(protocol.parse_request, self.operation, body, settings.max_choices)
        pictures = sum(len(image.url) for image in image_parts(request.messages))
        if len(body) - pictures > settings.max_body_bytes:
            what = "The request body without its pictures"
            raise too_large(what, settings.max_body_bytes, "TRIPTYCH_MAX_BODY_BYTES")
        if request.model not in pipelines:
            raise model_not_found(request.model)
        check_count(request.messages, pipelines[request.model].max_images)
        if large:
            await asyncio.to_thread(_refuse_cut_off, request)
        return replace(request, messages=())  # its pictures are large, and need not be held twice until the answer ends

    async def _serve(
        self,
        request: GenerationRequest,
        deadline: _Deadline,
        report: Report,
        scope: Scope,
        receive: Receive,
        send: Opened,
    ) -> None:
        state = state_of(scope)
        lifecycle, deep, backend = state["lifecycle"], _is_deep(scope), state["backend"]
        if (pipeline := backend.pipelines().get(request.model)) is None:  # removed in this moment
            raise model_not_found(request.model)
        place = Place(
            request=f"{report.request_id}.{_PROCESS}{next(_COUNT):x}",
            pipeline=request.model,
            places=request.choices,
            deadline=deadline.at(state["settings"].max_wait_s),
            batch=request.batch or request.priority > 0,
            keep_alive=request.keep_alive,
        )
        with report.admission(place, lifecycle.waiting(request.model)):
            if request.stream and lifecycle.state(request.model) is not State.READY:
                await while_loading(lifecycle.start(place), send, lambda: lifecycle.progress(request.model))
            else:
                await lifecycle.start(place)
        try:
            head = protocol.new_head(self.operation, request.model, stream=request.stream)
            with report.generation(request, head.id) as span:
                terms, parent = deadline.left(), span.traceparent
                submissions = self._submissions(request, terms, report.request_id, parent, deep=deep)
                patience_s = state["settings"].max_wait_s

                async def able(pipeline: str) -> None:
                    await lifecycle.again(place)
                    await when_ready(backend)(pipeline)

                retry = Retry(backend, able, patience_s, deadline.left, report.retried, whole=not request.stream)
                streams = await _submit(retry, submissions)
                deltas = report.heard(streams)
                try:
                    choices = self._choices(request, state["formats"].of(pipeline))
                    if request.stream:
                        await self._stream(request, head, choices, deltas, report, send.or_bare)
                    else:
                        response = await self._whole(request, head, choices, streams, deltas, report)
                        await response(scope, receive, send)
                finally:
                    deltas.cancel()
        finally:
            lifecycle.finish(place)

    def _submissions(
        self, request: GenerationRequest, terms: Terms, request_id: str, traceparent: str | None, *, deep: bool
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
                deep=deep,
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

        timing = report.timing if request.include_timing else None
        events = Events(self.operation, head, choices, include_usage=request.include_usage, timing=timing)
        written = Written(Totals(request.n))
        with report.writing(written):
            await write_stream(send, deltas, first, events, written, lambda error: _told(error, report.request_id))

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

    def at(self, most_s: float) -> float:
        """When it is over, by time.monotonic; of a request that gave itself no time, after the most."""
        timeout_ms = self._terms.timeout_ms
        return self._began + (most_s if timeout_ms is None else timeout_ms / 1000)


def _told(error: Exception, request_id: str) -> Failure:
    """What the client is told; what it is not is in the log."""
    failure = failure_of(error, request_id)
    log_failure(failure, error, request_id)
    return failure


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


def _is_deep(scope: Scope) -> bool:
    """Whether Triton's own spans shall be in the trace."""
    asked = header(scope, TRACE_HEADER.encode())
    if asked not in ("", "deep"):
        raise StageError(f"The header {TRACE_HEADER} can only say 'deep'.", param=TRACE_HEADER)
    return bool(asked) or state_of(scope)["settings"].trace_deep == 1


def model_not_found(name: str) -> ApiError:
    shown = name if len(name) <= 80 else name[:77] + "..."
    return ApiError(404, f"The model '{shown}' does not exist.", code="model_not_found", param="model")


def _refuse_cut_off(request: GenerationRequest) -> None:
    from pipelines.images.early import refuse_cut_off  # 50 ms of imports, for few servers

    refuse_cut_off(image_parts(request.messages))
