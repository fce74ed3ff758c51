"""What a generation request tells of itself: spans, metrics, log line, Server-Timing. Decides nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from starlette.types import Scope

from gateway import content
from gateway.backend import Delta, Stream
from gateway.choices import Arrival, Merged, Totals
from gateway.connection import header
from gateway.errors import ClientGone, Failure, failure_of
from gateway.lifecycle.driver import Place
from gateway.protocol import GenerationRequest, Operation
from gateway.sse import Written
from gateway.state import state_of
from observability import logs, metrics, tracing
from observability.keeping import LOAD_PHASES, LOAD_PHASES_MS
from observability.ring import Ended
from observability.tracing import NO_SPAN, Span
from pipelines.errors import StageError

log = logging.getLogger(__name__)

_USER_AGENT_LIMIT = 256
CLIENT_CLOSED = 499  # nginx's number for a client that left before its answer; no client ever sees it


class Report:
    """`with Report(…) as report:` around all of a request; its methods around the parts."""

    def __init__(self, scope: Scope, operation: Operation) -> None:
        state = state_of(scope)
        self.request_id = state["request_id"]
        self._timings = state["timings"]
        self._headers = state["headers"]
        self._traces = state["traces"]
        self._operation = operation
        self._pipeline = ""  # until it is known to be one of the catalog's: an unknown name is never a label
        self._choices = 1
        self._retries = 0
        self._began = time.perf_counter()
        self._began_ns = tracing.now_ns()
        self._submitted = self._began
        self._first_text_at = 0.0
        self._totals: Totals | None = None
        self._failure: Failure | None = None
        self._status = 200  # what HTTP saw: a stream that failed had sent its 200 before
        self._chat: Span = NO_SPAN
        self._heard: content.Heard | None = None
        self._server = tracing.start(
            f"{scope['method']} {operation.path}",
            kind="server",
            parent=header(scope, b"traceparent") or None,
            attributes=_http_attributes(scope, operation, self.request_id),
        )

    def __enter__(self) -> Report:
        if self._server is not NO_SPAN:
            logs.about(request_id=self.request_id, trace_id=self._server.trace_id, span_id=self._server.span_id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gone = isinstance(error, (ClientGone, asyncio.CancelledError))
        if gone:
            status, reason = CLIENT_CLOSED, "disconnected"
        elif failure := failure_of(error, self.request_id) if error else self._failure:
            status, reason = failure.status, failure.code
            _mark(self._server, failure)
        else:
            status, reason = 200, ""
        if self._failure is None or gone:
            self._status = status
        self._server.set({"http.response.status_code": self._status, "error.type": reason or None})
        self._count(status, reason)
        self._server.end()
        if self._traces and self._server.trace_id and self._server.span_id:
            ended = Ended(
                trace_id=self._server.trace_id,
                span_id=self._server.span_id,
                request_id=self.request_id,
                pipeline=self._pipeline,
                operation=self._operation.name,
                status=status,
                reason=reason,
                started_ns=self._began_ns,
                duration_ms=(time.perf_counter() - self._began) * 1000,
            )
            broke = status >= 500 or self._status != status or reason == "timeout"
            self._traces.end(ended, sampled=self._server.sampled, failed=broke, cancelled=gone)

    def served(self, request: GenerationRequest) -> None:
        """The model is one of those served."""
        self._pipeline = request.model
        self._choices = request.choices

    @contextmanager
    def admission(self, place: Place, depth: int) -> Iterator[None]:
        """Around the wait for a place, with `depth` requests before it, and for the pipeline to be loaded."""
        began = time.perf_counter()
        queued = metrics.QUEUED.labels(self._pipeline)
        queued.inc()
        span = tracing.start("admission", parent=self._server, attributes={"triptych.queue.depth": depth})
        with _ending(span):
            try:
                yield
            finally:
                queued.dec()
                self._timings["admission"] = waited = (time.perf_counter() - began) * 1000
                metrics.QUEUE_SECONDS.labels(self._pipeline).observe(waited / 1000, metrics.exemplar(self._server))
                span.set({"triptych.queue.wait_ms": waited})
                if place.cold:
                    self._cold(place, span)

    def _cold(self, place: Place, span: Span) -> None:
        """Its pipeline was not ready: how long that took, and what was done to it meanwhile."""
        metrics.COLD_STARTS.labels(self._pipeline).observe(place.waited_s)
        self._headers.append((b"x-cold-start-ms", str(round(place.waited_s * 1000)).encode()))
        worked = place.worked
        if worked is None or span is NO_SPAN:
            return
        name = f"model.{worked.verb}"
        self._timings[name] = (worked.ended - worked.began) * 1000
        # A load may be older than the request, whose part of it is in its trace; its phases are the whole load's.
        offset_ns = tracing.now_ns() - int(time.monotonic() * 1e9)
        begun_ns, ended_ns = (int(at * 1e9) + offset_ns for at in (max(place.asked, worked.began), worked.ended))
        phases = {
            LOAD_PHASES: list(worked.phases) or None,
            LOAD_PHASES_MS: [seconds * 1000 for seconds in worked.phases.values()] or None,
        }
        tracing.record(name, span, begun_ns, ended_ns, phases)

    def failed(self, failure: Failure, *, in_stream: bool) -> None:
        """It is answered with this, be it in a stream whose headers went out before it could begin."""
        self._failure = failure
        if not in_stream:
            self._status = failure.status

    @contextmanager
    def generation(self, request: GenerationRequest, response_id: str) -> Iterator[Span]:
        """Around the pipeline's work. The span's traceparent goes to the pipeline: its stages hang below."""
        name = self._operation.name
        if self._server is not NO_SPAN:
            attributes = _gen_ai_attributes(name, request, response_id)
            title = f"{name} {request.model}"
            self._chat = tracing.start(title, kind="client", parent=self._server, attributes=attributes)
            if content.wanted():
                self._chat.set({"gen_ai.input.messages": content.input_messages(request)})
        in_flight = metrics.IN_FLIGHT.labels(self._pipeline)
        in_flight.inc()
        self._submitted = time.perf_counter()
        try:
            with _ending(self._chat):
                yield self._chat
                if self._heard:
                    self._chat.set(
                        {"gen_ai.output.messages": content.output_messages(self._heard.texts, self._reasons)}
                    )
        finally:
            in_flight.dec()

    def taken(self, arrivals: Sequence[Arrival]) -> None:
        """The first deltas of all choices, which say what pictures were read for each."""
        for _, delta in arrivals:
            if delta.pictures:
                metrics.IMAGES.labels(self._pipeline).inc(len(delta.pictures))
                size = sum(3 * width * height for width, height in delta.pictures)
                metrics.IMAGE_BYTES.labels(self._pipeline).inc(size)

    def retried(self, lost: StageError) -> None:
        """A choice is asked again, since what worked on it was lost."""
        self._retries += 1
        metrics.RETRIED.labels(self._pipeline).inc()
        self._chat.event("asked again", {"error.type": lost.code, "triptych.stage": lost.stage or None})
        self._chat.set({"triptych.retries": self._retries})

    def heard(self, streams: Sequence[Stream]) -> Merged:
        """The choices' streams as one; what they say is in the trace if the operator has opted in."""
        if self._chat is NO_SPAN or not content.wanted():
            return Merged(streams)
        self._heard = content.Heard(streams)
        return self._heard

    @property
    def _reasons(self) -> Sequence[str]:
        return self._totals.finish_reasons if self._totals else ()

    def accepted(self, first: Delta) -> None:
        """The pipeline took the request: a stream's headers go out, and say what is known by then."""
        self._timings.update(first.stages or {"accepted": (time.perf_counter() - self._submitted) * 1000})

    def timing(self, totals: Totals) -> dict[str, float]:
        """What Server-Timing would say if it came after a stream: milliseconds by name."""
        waited = {"admission": self._timings["admission"]}
        took = {"total": (time.perf_counter() - self._began) * 1000}
        return {name: round(ms, 3) for name, ms in {**waited, **totals.stages, **took}.items()}

    @contextmanager
    def writing(self, written: Written) -> Iterator[None]:
        """The `sse.write` span, around a stream from its headers to its last byte."""
        span = tracing.start("sse.write", parent=self._server)
        with _ending(span):
            try:
                yield
            except asyncio.CancelledError:
                span.set({"triptych.sse.disconnected": True})
                raise
            finally:
                span.set(
                    {
                        "triptych.sse.events": written.events,
                        "triptych.sse.bytes": written.bytes,
                        "triptych.sse.blocked_ms": written.blocked_s * 1000,
                    }
                )
                if written.blocked_s:
                    metrics.BLOCKED_SECONDS.labels(self._pipeline).inc(written.blocked_s)
                if written.failure:
                    self._failure = written.failure
                    _mark(self._chat, written.failure)
                self.generated(written.totals, written.first_text_at)

    def generated(self, totals: Totals, first_text_at: float) -> None:
        """What the pipeline made: all of it if every choice has a last delta."""
        self._first_text_at = first_text_at
        if first_text_at:
            self._chat.set({"gen_ai.response.time_to_first_chunk": first_text_at - self._began})
            self._chat.event("first text", at_ns=self._began_ns + int((first_text_at - self._began) * 1e9))
        if len(totals.last) == self._choices:
            self._totals = totals
            self._timings.update(totals.stages)
            self._chat.set(
                {
                    "gen_ai.response.finish_reasons": totals.finish_reasons,
                    "gen_ai.usage.input_tokens": totals.prompt_tokens,
                    "gen_ai.usage.output_tokens": totals.completion_tokens,
                    "gen_ai.usage.cache_read.input_tokens": totals.cached_tokens,
                }
            )

    def _count(self, status: int, reason: str) -> None:
        """The metrics and the log line, once, at the end."""
        ended = time.perf_counter()
        pipeline, operation, totals = self._pipeline, self._operation.name, self._totals
        exemplar = metrics.exemplar(self._server)
        metrics.REQUEST_SECONDS.labels(pipeline, operation, str(status)).observe(ended - self._began, exemplar)
        if pipeline and reason:
            metrics.ABORTED.labels(pipeline, reason).inc()
        if self._first_text_at:
            metrics.FIRST_TOKEN_SECONDS.labels(pipeline).observe(self._first_text_at - self._began, exemplar)
        if totals:
            metrics.TOKENS.labels(pipeline, "input").inc(totals.prompt_tokens)
            metrics.TOKENS.labels(pipeline, "cached").inc(totals.cached_tokens)
            metrics.TOKENS.labels(pipeline, "output").inc(totals.completion_tokens)
            metrics.CACHE_HITS.labels(pipeline).inc(totals.cached_tokens > 0)
            each = totals.completion_tokens / len(totals.last)  # its choices come at once
            if each > 1 and self._first_text_at:
                seconds = (ended - self._first_text_at) / (each - 1)
                metrics.TIME_PER_OUTPUT_TOKEN_SECONDS.labels(pipeline).observe(seconds, exemplar)
            for stage, ms in totals.stages.items():
                metrics.STAGE_SECONDS.labels(pipeline, stage).observe(ms / 1000, exemplar)
        if log.isEnabledFor(logging.INFO):
            log.info(
                "request",
                extra={
                    "trace_id": self._server.trace_id,
                    "span_id": self._server.span_id,
                    "request_id": self.request_id,
                    "pipeline": pipeline or None,
                    "operation": operation,
                    "status": status,
                    "reason": reason or None,
                    "duration_ms": round((ended - self._began) * 1000, 3),
                    "prompt_tokens": totals.prompt_tokens if totals else None,
                    "output_tokens": totals.completion_tokens if totals else None,
                    "retries": self._retries or None,
                },
            )


@contextmanager
def _ending(span: Span) -> Iterator[None]:
    """Ends the span with its block, marked with what ended that."""
    try:
        yield
    except asyncio.CancelledError:
        span.set({"error.type": "disconnected"})
        raise
    except Exception as error:
        span.error(error.code if isinstance(error, StageError) else type(error).__name__)
        raise
    finally:
        span.end()


def _mark(span: Span, failure: Failure) -> None:
    """Semantic conventions, HTTP server spans: a 4xx leaves the status unset."""
    if failure.status >= 500:
        span.error(failure.code, failure.message)
    else:
        span.set({"error.type": failure.code})


def _http_attributes(scope: Scope, operation: Operation, request_id: str) -> Mapping[str, Any]:
    host, port = scope.get("server") or (None, None)
    client, _ = scope.get("client") or (None, None)
    return {
        "http.request.method": scope["method"],
        "http.route": operation.path,
        "url.path": scope["path"],
        "url.scheme": scope.get("scheme", "http"),
        "server.address": host,
        "server.port": port,
        "client.address": client,
        "network.protocol.version": scope.get("http_version"),
        "user_agent.original": header(scope, b"user-agent")[:_USER_AGENT_LIMIT] or None,
        "http.request.resend_count": _resends(scope),
        "triptych.request_id": request_id,
        "triptych.key": scope["state"].get("key"),  # its name
    }


def _resends(scope: Scope) -> int | None:
    """How often the official client says that it has sent this request before; it counts what fails as a new try."""
    text = header(scope, b"x-stainless-retry-count")
    return int(text) or None if text.isascii() and text.isdecimal() and len(text) < 4 else None


def _gen_ai_attributes(operation: str, request: GenerationRequest, response_id: str) -> Mapping[str, Any]:
    sampling = request.sampling
    attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "triptych",
        "gen_ai.request.model": request.model,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.stop_sequences": list(sampling.stop) or None,
        "gen_ai.request.stream": request.stream,
        "gen_ai.request.choice.count": request.choices if request.choices > 1 else None,
        "gen_ai.response.id": response_id,
        "gen_ai.response.model": request.model,
        "enduser.id": request.user,
    }
    return attributes | {f"triptych.metadata.{key}": value for key, value in request.metadata.items()}
