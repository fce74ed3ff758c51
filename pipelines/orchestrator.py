"""The orchestrator model: lanes and direct streams in, `pipelines.chat` behind, one thread that turns it.

Knows no Triton: `call` is a unary call of another model.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import orjson

from observability import tracing
from pipelines import contracts, wire
from pipelines.chat import Chat, Inputs, Prompt, Text, Window
from pipelines.contracts import Asked, Tensor, Values
from pipelines.errors import StageError
from pipelines.generate import Poll
from pipelines.pipeline import Pipeline
from pipelines.recorder import Recorder
from pipelines.sinks import Lane, Reply, Stream
from pipelines.terms import Terms

log = logging.getLogger(__name__)

_SUBMIT_THREADS = 8  # preprocess and submit calls under way at once
_PICTURE_THREADS = 64  # the same, of requests with pictures: these wait for hosts, and for memory to decode in
_OF_PICTURES = (contracts.FEATURES, contracts.PICTURES)


class Call(Protocol):
    """A unary call of a stage's model; raises StageError."""

    def __call__(
        self, stage: str, values: Values, outputs: Sequence[Tensor], parameters: Mapping[str, str | int]
    ) -> dict[Tensor, Any]: ...


class CalledStages:
    """The stages of one pipeline, as `pipelines.chat` wants them, over unary calls."""

    def __init__(self, call: Call, *, per_token: bool, takes_images: bool) -> None:
        self._calls = call
        self.quiet = False
        self._per_token = per_token
        self._takes_images = takes_images

    def _call(
        self, stage: str, values: Values, outputs: Sequence[Tensor], parameters: Mapping[str, str | int]
    ) -> dict[Tensor, Any]:
        if self.quiet:
            raise StageError("this pipeline is being replaced", code="unavailable", stage=stage)
        return self._calls(stage, values, outputs, parameters)

    def preprocess(self, inputs: Inputs, sampling: str, traceparent: str | None) -> Prompt:
        values = {tensor: inputs[tensor.name] for tensor in contracts.REQUEST if tensor.name in inputs}
        out = self._call(
            "preprocess",
            {**values, contracts.SAMPLING: sampling},
            [contracts.INPUT_IDS, contracts.SAMPLING, *(_OF_PICTURES if self._takes_images else ())],
            {"traceparent": traceparent} if traceparent else {},
        )
        if not self._takes_images:
            return Prompt(out[contracts.INPUT_IDS], out[contracts.SAMPLING])
        pictures = [(width, height) for width, height in orjson.loads(out[contracts.PICTURES])]
        features = out[contracts.FEATURES] if pictures else None
        return Prompt(out[contracts.INPUT_IDS], out[contracts.SAMPLING], features, pictures)

    def submit(self, id: str, prompt: Prompt, asked: Terms, traceparent: str | None) -> None:
        parameters: dict[str, str | int] = {contracts.OPERATION: "submit", "id": id, **asked.parameters()}
        if traceparent:
            parameters["traceparent"] = traceparent
        values: dict[Tensor, Any] = {contracts.INPUT_IDS: prompt.input_ids, contracts.SAMPLING: prompt.sampling}
        if prompt.features is not None:
            values[contracts.FEATURES] = prompt.features
        self._call("generate", values, [contracts.ROWS], parameters)

    def poll(self, wait_s: float) -> Poll:
        parameters: dict[str, str | int] = {contracts.OPERATION: "poll", "wait_ms": int(wait_s * 1000)}
        out = self._call("generate", {}, [contracts.OUTPUT_IDS, contracts.ROWS], parameters)
        return wire.unpack_poll(out[contracts.OUTPUT_IDS], out[contracts.ROWS])

    def cancel(self, id: str) -> None:
        self._call("generate", {}, [contracts.ROWS], {contracts.OPERATION: "cancel", "id": id})

    def postprocess(self, windows: list[Window]) -> list[Text]:
        ids, rows = wire.pack_windows(windows)
        parameters = {"per_token": self._per_token}
        out = self._call("postprocess", {contracts.OUTPUT_IDS: ids, contracts.ROWS: rows}, [contracts.ROWS], parameters)
        return wire.unpack_texts(out[contracts.ROWS])

    def trace_postprocess(self, traceparent: str, start_ns: int, end_ns: int, calls: int, busy_ns: int) -> None:
        attributes = {"triptych.calls": calls, "triptych.busy_ms": busy_ns / 1e6}
        tracing.record("postprocess", traceparent, start_ns, end_ns, attributes)


class Orchestrator:
    """Every method may be called from any thread."""

    def __init__(self, pipeline: Pipeline, call: Call) -> None:
        per_token = pipeline.stream_event == "token"
        self._recorder = Recorder.of(pipeline, os.environ)
        self._stages = CalledStages(call, per_token=per_token, takes_images=pipeline.takes_images)
        self._chat = Chat(self._stages, self._recorder)
        self._lanes: dict[str, Lane] = {}  # by listener: a gateway
        self._numbers = itertools.count()
        self._submitters = ThreadPoolExecutor(_SUBMIT_THREADS, thread_name_prefix="submit")
        self._with_pictures = ThreadPoolExecutor(_PICTURE_THREADS, thread_name_prefix="submit-pictures")
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._turn, name="poller", daemon=True)
        self._thread.start()

    def take(self, asked: Asked, reply: Reply) -> None:
        """One request: an operation on a lane, or, without one, a stream of its own."""
        listener = str(asked.parameters.get("listener", ""))
        if asked.operation == "lane":
            self._open(listener, reply)
        elif asked.operation == "close":
            self._close(listener)
            reply.end()
        elif asked.operation == "submit":
            lane = self._lanes.get(listener)
            if lane is None:
                raise StageError(f"no lane is open for listener {listener!r}", code="unavailable")
            self._start(f"{listener}/{asked.id}", asked, lane)
            reply.end()  # its events come on the lane
        elif asked.operation == "cancel":
            reply.end()
            self._submitters.submit(self._chat.cancel, f"{listener}/{asked.parameters.get('id')}")
        elif asked.operation == "quiesce":  # before its process is killed: see `gateway.loader`
            self._stages.quiet = True
            reply.end()
        elif asked.operation == "recording":
            recorded = self._recorder.recording(str(asked.parameters.get("span"))) if self._recorder else b""
            reply.send({contracts.EVENTS: recorded}, final=True)
        elif not asked.operation:
            self._start(f"stream-{next(self._numbers)}", asked, Stream(reply))
        else:
            raise StageError(f"unknown operation {asked.operation!r}", param=contracts.OPERATION)
        self._wake.set()

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        for listener in list(self._lanes):
            self._close(listener)
        self._thread.join(timeout=5)
        for submitters in (self._submitters, self._with_pictures):
            submitters.shutdown(wait=False, cancel_futures=True)

    def _open(self, listener: str, reply: Reply) -> None:
        if lane := self._lanes.get(listener):
            lane.move(reply)
            return
        lane = self._lanes[listener] = Lane(reply)
        self._chat.attach(lane)
        lane.flush({}, now=time.monotonic())  # a first heartbeat says that the lane is open

    def _close(self, listener: str) -> None:
        if lane := self._lanes.pop(listener, None):
            self._chat.detach(lane)
            lane.end()

    def _start(self, handle: str, asked: Asked, sink: Lane | Stream) -> None:
        inputs: dict[str, Any] = {
            tensor.name: text for tensor in contracts.TEXTS if (text := asked.encoded(tensor)) is not None
        }
        if ids := asked.ids(contracts.TEXT_IDS):
            inputs[contracts.TEXT_IDS.name] = ids
        if (image := asked.data(contracts.IMAGE)) is not None:
            inputs[contracts.IMAGE.name] = image
        pictured = contracts.brings_images(inputs.get(contracts.MESSAGES.name), image)
        sampling, terms = asked.text(contracts.SAMPLING) or "{}", Terms.of(asked.parameters)
        self._chat.admit(handle, asked.id, sink, asked.traceparent)
        submitters = self._with_pictures if pictured else self._submitters
        submitters.submit(self._run, handle, inputs, sampling, terms)

    def _run(self, handle: str, inputs: Inputs, sampling: str, terms: Terms) -> None:
        try:
            self._chat.start(handle, inputs, sampling, terms)
        except Exception:
            log.exception("a request could not be started")
        finally:
            self._wake.set()

    def _turn(self) -> None:
        """The poller: turns while anybody listens."""
        while not (self._closing or self._stages.quiet):
            if self._chat.idle:
                self._wake.wait(1.0)
                self._wake.clear()
                continue
            try:
                for gone in self._chat.turn():
                    self._lanes = {listener: lane for listener, lane in self._lanes.items() if lane is not gone}
            except StageError as error:
                log.warning("turn failed: %s", error)
                time.sleep(0.2)  # generate is loading, or going away
            except Exception:
                log.exception("turn failed")
                time.sleep(0.2)
