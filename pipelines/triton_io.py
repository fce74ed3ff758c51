"""Between Triton's Python backend and the stages: tensors, parameters, answers, calls of other models.

The only file that imports triton_python_backend_utils; each `model.py` in the repository is written in its terms.
It never makes a decoupled BLS call (DESIGN §4: unsafe in every release to date). `pb.X` is looked up at call time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import select
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from observability import logs, tracing
from pipelines import contracts
from pipelines.contracts import Tensor, Values
from pipelines.errors import StageError
from pipelines.orchestrator import Orchestrator
from pipelines.pipeline import Pipeline, get_pipeline
from pipelines.sender import Sender
from pipelines.sources import pull

log = logging.getLogger(__name__)

Answer = Callable[[Values | StageError], None]

_PICTURE_THREADS = 64


def open_stage(args: Mapping[str, str], stage: str) -> Pipeline:
    """What `initialize` begins with: the model's pipeline, its weights there, and tracing set up."""
    parameters = json.loads(args["model_config"])["parameters"]
    logs.configure_stage(stage, parameters["pipeline"]["string_value"])
    _end_with_the_server()
    tracing.configure(f"triptych-{stage}")
    pipeline = get_pipeline(parameters["pipeline"]["string_value"])
    pull(pipeline)
    gc.freeze()  # what is imported is no garbage: looking through it stops the stage for some 20 ms
    return pipeline


def close_stage() -> None:
    """What `finalize` ends with."""
    tracing.shutdown()


class Incoming:
    """One request, decoded when asked: inputs as text or ids, parameters as they are."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self._encoded: dict[str, bytes | None] = {}
        self.id: str = request.request_id()
        self.parameters: dict[str, Any] = json.loads(request.parameters() or "{}")
        self.operation: str = str(self.parameters.get(contracts.OPERATION, ""))
        self.traceparent: str | None = self.parameters.get("traceparent") or None

    def text(self, tensor: Tensor) -> str | None:
        """A BYTES [1] input, or None if it was not sent."""
        encoded = self.encoded(tensor)
        try:
            return None if encoded is None else encoded.decode()
        except UnicodeDecodeError as error:
            raise StageError(f"'{tensor.name}' is not valid UTF-8: {error.reason}.", param=tensor.name) from None

    def encoded(self, tensor: Tensor) -> bytes | None:
        """The same as it came. Read once, since each reading is two copies."""
        if tensor.name not in self._encoded:
            self._encoded[tensor.name] = self._read(tensor)
        return self._encoded[tensor.name]

    def _read(self, tensor: Tensor) -> bytes | None:
        found = pb.get_input_tensor_by_name(self._request, tensor.name)
        if found is None:
            return None
        values = found.as_numpy().reshape(-1)
        if len(values) != 1:
            raise StageError(f"'{tensor.name}' must hold one string, not {len(values)}.", param=tensor.name)
        return bytes(values[0])

    def ids(self, tensor: Tensor) -> list[int]:
        """An INT64 [-1] input; empty if it was not sent."""
        found = pb.get_input_tensor_by_name(self._request, tensor.name)
        ids: list[int] = [] if found is None else found.as_numpy().tolist()
        return ids

    def data(self, tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """A UINT8 [-1] input, copied: Triton takes its memory back. None if it was not sent."""
        found = pb.get_input_tensor_by_name(self._request, tensor.name)
        return None if found is None else np.array(found.as_numpy(), dtype=np.uint8).reshape(-1)

    def brings_images(self) -> bool:
        image = pb.get_input_tensor_by_name(self._request, contracts.IMAGE.name)
        return contracts.brings_images(self.encoded(contracts.MESSAGES), image)

    def span(self, name: str) -> tracing.Span:
        return tracing.start(name, parent=self.traceparent)


def respond(run: Callable[[Incoming], Values], requests: Sequence[Any], stage: str) -> list[Any]:
    """`execute` of a model that answers at once: one call of `run` a request, its values or its error the answer."""
    return [_response(run, Incoming(request), stage) for request in requests]


def respond_aside(
    run: Callable[[Incoming], Values], requests: Sequence[Any], stage: str, pool: Executor | None
) -> list[Any] | None:
    """`execute` of a default-mode model that has a pool for the requests that bring pictures: the others go by."""
    if pool is None:
        return respond(run, requests, stage)

    def answered(asked: Incoming, answer: Answer) -> None:
        try:
            answer(run(asked))
        except Exception as error:
            answer(_stage_error(error, stage, asked))

    def start(asked: Incoming, answer: Answer) -> None:
        if asked.brings_images():
            pool.submit(answered, asked, answer)
        else:
            answered(asked, answer)

    respond_later(start, requests, stage)
    return None


def pool_for_pictures() -> Executor:
    """Its threads wait, for hosts and for memory; how many decode at once is not its matter (`images.vision`)."""
    return ThreadPoolExecutor(_PICTURE_THREADS, thread_name_prefix="pictures")


def respond_later(run: Callable[[Incoming, Answer], None], requests: Sequence[Any], stage: str) -> None:
    """`execute` of a default-mode model that answers from another thread: `run` gets the function that answers."""
    for request in requests:
        reply, asked = DecoupledReply(request.get_response_sender(), stage), None
        try:
            asked = Incoming(request)
            run(asked, reply.answer)
        except Exception as error:
            reply.fail(_stage_error(error, stage, asked))


def respond_streaming(run: Callable[[Incoming, DecoupledReply], None], requests: Sequence[Any], stage: str) -> None:
    """`execute` of a decoupled model: `run` gets the reply it may use as long as it lives."""
    for request in requests:
        reply, asked = DecoupledReply(request.get_response_sender(), stage), None
        try:
            asked = Incoming(request)
            run(asked, reply)
        except Exception as error:
            reply.fail(_stage_error(error, stage, asked))


class DecoupledReply:
    """The responses of one request, sent from any thread (`pipelines.sinks.Reply`)."""

    def __init__(self, raw: Any, stage: str) -> None:
        self._sender = Sender(raw)
        self._stage = stage

    def send(self, values: Values, *, final: bool = False) -> None:
        self._send(_response(lambda _: values, None, self._stage), final)

    def answer(self, values: Values | StageError) -> None:
        """The one response of a default-mode model."""
        if isinstance(values, StageError):
            self.fail(values)
        else:
            self.send(values, final=True)

    def fail(self, error: StageError) -> None:
        self._send(pb.InferenceResponse([], error=pb.TritonError(error.to_json())), final=True)

    def end(self) -> None:
        self._send(None, final=True)

    def gone(self) -> bool:
        try:
            return self._sender.is_cancelled()
        except Exception:
            return True

    def _send(self, response: Any, final: bool) -> None:
        try:
            self._sender.send(response, final=final)
        except Exception as error:  # the client has gone: nobody is left to be told
            log.debug("response not sent: %s", error)


def orchestrate(pipeline: Pipeline) -> Orchestrator:
    """The orchestrator of a pipeline, with its stages called by BLS."""

    def call(
        stage: str, values: Values, outputs: Sequence[Tensor], parameters: Mapping[str, str | int]
    ) -> dict[Tensor, Any]:
        request = pb.InferenceRequest(
            model_name=contracts.model_name(pipeline.name, stage),
            requested_output_names=[tensor.name for tensor in outputs],
            inputs=_tensors(values),
            parameters=dict(parameters),
        )
        try:
            response = request.exec()
        except Exception as error:  # the model is missing, or the server is going away
            raise StageError(f"stage {stage} cannot be called: {error}", code="unavailable", stage=stage) from None
        if response.has_error():
            raise StageError.from_text(response.error().message(), stage=stage)
        return {tensor: _value(tensor, pb.get_output_tensor_by_name(response, tensor.name)) for tensor in outputs}

    return Orchestrator(pipeline, call)


def _response(run: Callable[[Any], Values], request: Any, stage: str) -> Any:
    try:
        return pb.InferenceResponse(_tensors(run(request)))
    except Exception as error:  # an exception must become an answer: nobody else would give one
        return pb.InferenceResponse([], error=pb.TritonError(_stage_error(error, stage, request).to_json()))


def _stage_error(error: Exception, stage: str, asked: Incoming | None) -> StageError:
    if isinstance(error, StageError):
        error.stage = error.stage or stage
        return error
    log.error("request failed", exc_info=error, extra=_ids(asked) if asked else {})
    return StageError(f"stage {stage} failed: {type(error).__name__}", code="internal", stage=stage)


def _ids(asked: Incoming) -> dict[str, str]:
    """What finds the request in the gateway's log, and its trace."""
    _, trace_id, span_id, *_ = [*(asked.traceparent or "").split("-"), "", "", ""]
    ids = {"request_id": asked.id, "trace_id": trace_id, "span_id": span_id}
    return {name: id for name, id in ids.items() if id}


def _tensors(values: Values) -> list[Any]:
    """What came from another model (`_value`) is passed on as it is, in the memory it lies in."""
    return [
        value if isinstance(value, pb.Tensor) else pb.Tensor(tensor.name, _array(tensor, value))
        for tensor, value in values.items()
    ]


def _array(tensor: Tensor, value: Any) -> np.ndarray[Any, Any]:
    if tensor.dtype == "TYPE_STRING":
        return np.array([value.encode() if isinstance(value, str) else value], dtype=np.object_)
    return np.asarray(value, dtype=np.uint8 if tensor.dtype == "TYPE_UINT8" else np.int64)


def _value(tensor: Tensor, found: Any) -> Any:
    if tensor.dtype == "TYPE_UINT8":  # tens of megabytes, which are nothing to whoever passes them on
        return found
    return found.as_numpy()[0] if tensor.dtype == "TYPE_STRING" else found.as_numpy().tolist()


def _end_with_the_server() -> None:
    """End this stub when its server has died: else it lingers after a `kill -9`, with its shared memory (DESIGN §4)."""
    with open("/proc/self/cmdline", "rb") as file:  # the backend starts a stub as: stub model.py REGION … … SERVER …
        words = file.read().split(b"\0")
    server = os.pidfd_open(int(words[5]))

    def watch() -> None:
        select.select([server], [], [])
        with contextlib.suppress(OSError):
            os.unlink(b"/dev/shm/" + words[2])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="server-watch", daemon=True).start()
