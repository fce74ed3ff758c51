"""The lanes to Triton: one gRPC stream a pipeline, which carries all its requests (DESIGN §3). Implements `Backend`.

Written on the generated gRPC messages, not on tritonclient's own classes: those cost 60-140 µs a response, and cannot
submit and cancel on the stream they read. Knows no HTTP and no OpenAI.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from gateway.alone import alone
from gateway.backend import Submission
from gateway.infer_request import request_bytes
from gateway.lane_stream import LaneStream
from gateway.silence import Silence
from gateway.witness import Nobody, Witness
from observability import metrics
from pipelines import contracts, wire
from pipelines.chat import Event
from pipelines.errors import StageError
from pipelines.pipeline import Pipeline

log = logging.getLogger(__name__)

ROTATE_AFTER = 1000  # messages: a response stream that never ends grows the server by 2 KB each (DESIGN §3)
SILENT_S = 5.0  # a lane without a message for so long is dead; a heartbeat comes ten times as often
_RECONNECT_S = 0.5
_CLOSE_S = 2.0  # for the orchestrator to finish the lanes
_LANE = "lane-"  # the id of a lane's own request, with a number; a stream's has a dot
_MAX_MESSAGE = 2**31 - 1  # gRPC's own limit: how large a request may be is the gateway's to say (`Settings`)
# gRPC's own wait between attempts grows to two minutes; a restarted Triton is back in seconds.
RECONNECT = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class Lane:
    """One pipeline's lane: connects, keeps connected, rotates, and shares out what comes."""

    def __init__(
        self,
        pipeline: Pipeline,
        infer: Any,
        accept_timeout_s: float,
        on_unhealthy: Callable[[str, str], None],
        endpoint: str,
        witness: Witness,
    ) -> None:
        self.pipeline = pipeline
        self._witness = witness
        self._endpoint = endpoint
        self._on_unhealthy = on_unhealthy
        self._accept_timeout_s = accept_timeout_s
        self._infer = infer
        self._model = contracts.model_name(pipeline.name, "orchestrator")
        self._listener = f"gateway-{os.getpid()}-{os.urandom(4).hex()}"
        self._streams: dict[str, LaneStream] = {}
        self._alone: dict[str, asyncio.Task[None]] = {}  # by id: submissions under way on streams of their own
        self._out: asyncio.Queue[Any] = asyncio.Queue()
        self._heard = 0.0
        self._opened = asyncio.Event()
        self._over: StageError | None = None
        self._numbers = 0
        self._messages = 0
        self._closing = False
        self._leaving = False  # the orchestrator takes nothing more, and ends what it has
        self._connection: asyncio.Task[str] | None = None
        self._received = metrics.LANE_MESSAGES.labels(pipeline.name)
        self._lag = metrics.LANE_LAG_SECONDS.labels(pipeline.name)

    @property
    def ready(self) -> bool:
        resting = self._closing or self._leaving
        return not resting and bool(self._heard) and time.monotonic() - self._heard < SILENT_S

    async def submit(self, submission: Submission) -> LaneStream:
        if not self.ready:
            raise StageError(f"pipeline '{self.pipeline.name}' is not ready; try again shortly.", code="unavailable")
        stream = self._streams[submission.id] = LaneStream(submission.id, self._cancel, self._accept_timeout_s)
        if submission.terms.timeout_ms is not None:
            stream.expire_after(submission.terms.timeout_ms / 1000)
        if not self._brings_images(submission):
            self._witness.submitted(self.pipeline.name, submission.id)
        parameters: dict[str, str | int] = {"listener": self._listener, contracts.OPERATION: "submit"}
        if submission.traceparent:
            parameters["traceparent"] = submission.traceparent
        inputs = {**submission.inputs, contracts.SAMPLING.name: submission.sampling}
        request = request_bytes(self._model, submission.id, {**parameters, **submission.terms.parameters()}, inputs)
        if submission.deep and submission.traceparent:
            self._submit_alone(stream, request, submission.traceparent)
        else:
            self._out.put_nowait(request)
        return stream

    def _brings_images(self, submission: Submission) -> bool:
        messages = submission.inputs.get(contracts.MESSAGES.name, b"")
        return self.pipeline.takes_images and b"image_url" in (
            messages if isinstance(messages, bytes) else str(messages).encode()
        )

    async def recording(self, span: str) -> bytes:
        request = request_bytes(self._model, "", {contracts.OPERATION: "recording", "span": span}, {})
        for outputs in await alone(self._infer, request, timeout_s=self._accept_timeout_s):
            for packed in outputs:
                return packed[4:]  # a BYTES element begins with its length
        return b""

    def _submit_alone(self, stream: LaneStream, request: bytes, traceparent: str) -> None:
        """On a stream that has the header: Triton reads it once a stream, and traces every request on that. What the
        request then brings comes on the lane, as everybody's."""

        async def submit() -> None:
            try:
                await alone(
                    self._infer, request, timeout_s=self._accept_timeout_s, headers=(("traceparent", traceparent),)
                )
            except StageError as error:
                if self._streams.pop(stream.id, None):
                    stream.fail(error)
            finally:
                del self._alone[stream.id]

        self._alone[stream.id] = asyncio.create_task(submit(), name=f"submission of {stream.id}")

    async def run(self) -> None:
        """Until closed: connect, and connect again when the lane has died."""
        while not self._closing:
            self._connection = asyncio.create_task(self._connect(), name=f"connection of {self.pipeline.name}")
            try:
                await asyncio.wait([self._connection])
            finally:
                self._connection.cancel()
            if self._connection.cancelled():
                return
            reason = self._connection.result()
            if self._heard and not self._closing:
                where = f" at {self._endpoint}" if self._endpoint else ""
                log.warning("lane of %s%s lost: %s", self.pipeline.name, where, reason)
            self._lose(StageError(f"pipeline '{self.pipeline.name}' was lost: {reason}", code="unavailable"))
            await asyncio.sleep(0 if self._closing else _RECONNECT_S)

    def lose(self, error: StageError) -> None:
        """The pipeline has died: whoever waits is told, and nothing is sent any more."""
        self._closing, self._over = True, error
        self._opened.set()
        self._lose(error)
        if self._connection:
            self._connection.cancel()

    async def opened(self) -> None:
        """Until the first heartbeat. Raises what the lane was lost by before that."""
        await self._opened.wait()
        if self._over:
            raise self._over

    def close(self) -> None:
        """Let the orchestrator finish the lane: Triton waits for open requests when it stops."""
        self._closing = True
        self._send("", {"listener": self._listener, contracts.OPERATION: "close"})
        self._out.put_nowait(None)

    async def _connect(self) -> str:
        """Open the lane and read it to its end; answers why it ended."""
        self._out, self._messages, self._leaving = asyncio.Queue(), 0, False
        self._open()
        call = self._infer(self._requests(self._out))
        silence = Silence(SILENT_S, call.cancel)
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                silence.broken()
                self._take(response)
            return "the lane was closed"
        except asyncio.CancelledError:
            if silence.has_fallen:
                return f"no heartbeat for {SILENT_S:g} s"
            raise
        except grpc.aio.AioRpcError as error:
            return error.details() or str(error.code())
        except _LaneError as error:
            return str(error)
        finally:
            silence.close()
            call.cancel()

    async def _requests(self, queue: asyncio.Queue[Any]) -> AsyncIterator[Any]:
        while (request := await queue.get()) is not None:
            yield request

    def _open(self) -> None:
        self._numbers += 1
        self._send(f"{_LANE}{self._numbers}", {"listener": self._listener, contracts.OPERATION: "lane"})

    def _cancel(self, id: str) -> None:
        self._streams.pop(id, None)
        self._witness.ended(self.pipeline.name, id)
        if submission := self._alone.get(id):  # the cancel must not come before it, by another stream
            submission.add_done_callback(lambda _: self._cancel(id))
            return
        self._send("", {"listener": self._listener, contracts.OPERATION: "cancel", "id": id})

    def _send(
        self, id: str, parameters: Mapping[str, str | int], inputs: Mapping[str, str | bytes | list[int]] | None = None
    ) -> None:
        self._out.put_nowait(request_bytes(self._model, id, parameters, inputs or {}))

    def _take(self, response: Any) -> None:
        """One response: a lane message, or the error of one of our requests."""
        if response.error_message:
            self._refused(
                response.infer_response.id, StageError.from_text(response.error_message, stage="orchestrator")
            )
            return
        self._heard = time.monotonic()
        self._opened.set()
        for packed in response.infer_response.raw_output_contents:
            events, counters, made_ns = wire.unpack_events(packed[4:])  # a BYTES element begins with its length
            self._lag.observe(max(0.0, (time.time_ns() - made_ns) / 1e9))
            for event in events:
                self._share(event)
            if counters:
                metrics.engine_counters(self.pipeline.name, counters, self._endpoint)
            self._witness.heard(self.pipeline.name, counters)
        self._received.inc()
        self._messages += 1
        if self._leaving:
            self._leave()
        elif self._messages >= ROTATE_AFTER:
            self._messages = 0
            self._open()

    def _refused(self, id: str, error: StageError) -> None:
        """A request was not taken. Where the orchestrator is gone, or another than has our lane, none will be: whoever
        waits on the lane is still served, by an orchestrator that is being unloaded."""
        self._witness.ended(self.pipeline.name, id)
        if error.code == "unhealthy":  # Triton's word of whom we call, which is the orchestrator
            self._on_unhealthy(self.pipeline.name, "orchestrator")
        stream = self._streams.pop(id, None)
        if stream:
            stream.fail(error)
        elif id.removeprefix(_LANE).isdecimal():
            raise _LaneError(error.message)
        if error.lost:
            self._leaving = True
            self._leave()

    def _leave(self) -> None:
        if not self._streams:
            raise _LaneError("its orchestrator takes no more requests")

    def _share(self, event: Event) -> None:
        if event.error and event.error.code == "unhealthy":
            self._on_unhealthy(self.pipeline.name, event.error.stage)
        if event.prompt_tokens or event.error:  # its first: preprocess has done its part
            self._witness.taken(self.pipeline.name, event.id)
        stream = self._streams.pop(event.id, None) if event.last else self._streams.get(event.id)
        if stream:
            stream.push(event)

    def _lose(self, error: StageError) -> None:
        """The lane has died: whoever waits on it is told."""
        self._heard = 0.0
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)


class _LaneError(Exception):
    """The lane cannot be used."""


class Lanes:
    """The lanes of the pipelines that are loaded, on one channel (`gateway.backend.Backend`).

    `pipelines` are those served, loaded or not: whoever has it may change it. `endpoint` tells one Triton from others
    in metrics and logs, where there are several.
    """

    def __init__(
        self,
        target: str,
        pipelines: Mapping[str, Pipeline],
        *,
        accept_timeout_s: float,
        endpoint: str = "",
        witness: Witness | None = None,
    ) -> None:
        self._target = target
        self._witness = witness or Nobody()
        self._endpoint = endpoint
        self._accept_timeout_s = accept_timeout_s
        self.on_unhealthy: Callable[[str, str], None] = lambda pipeline, stage: None  # the loader's
        self._pipelines = pipelines
        self._lanes: dict[str, Lane] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._infer: Any = None
        self._channel: Any = None

    async def __aenter__(self) -> Lanes:
        options = [
            ("grpc.max_receive_message_length", _MAX_MESSAGE),
            ("grpc.max_send_message_length", _MAX_MESSAGE),
            *RECONNECT,
        ]
        self._channel = grpc.aio.insecure_channel(self._target, options=options)
        # The method of the generated stub, whose requests are written before they come to it.
        self._infer = self._channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        for lane in self._lanes.values():
            lane.close()
        await self._end(list(self._tasks.values()))
        await self._channel.close()

    def open(self, pipeline: str) -> Lane:
        """A lane to a pipeline whose models are loaded: it connects, and stays connected until it is closed."""
        lane = Lane(
            self._pipelines[pipeline],
            self._infer,
            self._accept_timeout_s,
            self._unhealthy,
            self._endpoint,
            self._witness,
        )
        self._witness.opened(pipeline)
        self._lanes[pipeline] = lane
        self._tasks[pipeline] = asyncio.create_task(lane.run(), name=f"lane {pipeline}")
        return lane

    async def close(self, pipeline: str) -> None:
        """The orchestrator ends it: nothing of it is in flight in Triton then."""
        if lane := self._lanes.pop(pipeline, None):
            self._witness.closed(pipeline)
            lane.close()
            await self._end([self._tasks.pop(pipeline)])
            metrics.forget_engine(pipeline, self._endpoint)

    def lose(self, pipeline: str, error: StageError) -> None:
        """The pipeline has died: its lane is over, and whoever waits on it is told."""
        if lane := self._lanes.pop(pipeline, None):
            self._witness.closed(pipeline)
            lane.lose(error)
            del self._tasks[pipeline]
            metrics.forget_engine(pipeline, self._endpoint)  # its counts start anew

    def pipelines(self) -> Mapping[str, Pipeline]:
        return self._pipelines

    def ready(self, pipeline: str) -> bool:
        return pipeline in self._lanes and self._lanes[pipeline].ready

    async def submit(self, submission: Submission) -> LaneStream:
        if lane := self._lanes.get(submission.pipeline):
            return await lane.submit(submission)
        raise StageError(f"pipeline '{submission.pipeline}' is not ready; try again shortly.", code="unavailable")

    def _unhealthy(self, pipeline: str, stage: str) -> None:
        self.on_unhealthy(pipeline, stage)

    async def recording(self, pipeline: str, span: str) -> bytes:
        lane = self._lanes.get(pipeline)
        return await lane.recording(span) if lane else b""

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        _, late = await asyncio.wait(tasks, timeout=_CLOSE_S) if tasks else (set(), set())
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
