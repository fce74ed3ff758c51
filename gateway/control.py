"""Triton's model control, and the one call of a model that is no request: an operation of generate.

Knows names of models and Triton's words for what went wrong; no pipeline and no lifecycle.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any

import grpc
import orjson
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway.lane import RECONNECT
from pipelines import contracts, wire
from pipelines.errors import StageError

_UNLOAD_S = 30.0
_PLACE = re.compile(r"\s*At:\n.*", re.DOTALL)  # of an exception in a stub: its traceback, which is in the log
_WHERE = re.compile(r"^(?:failed to load|load failed for model) '[^']*'[^:]*: (?:version \d+ is at \w+ state: )?")


_BUSY = "currently loading or unloading"  # Triton's word where a related model is


class Away(Exception):
    """Triton does not answer, or not this for the moment."""


class Control:
    """One Triton. `async with` it."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._channel: Any = None
        self._stub: Any = None

    async def __aenter__(self) -> Control:
        self._channel = grpc.aio.insecure_channel(self._target, RECONNECT)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._channel.close()

    async def live(self, timeout_s: float) -> bool:
        try:
            answer = await self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.live)

    async def load(self, model: str, timeout_s: float) -> None:
        """An ensemble brings its members. Raises StageError with what Triton says of a model that cannot be loaded."""
        request = service_pb2.RepositoryModelLoadRequest(model_name=model)
        await self._call(self._stub.RepositoryModelLoad, request, timeout_s)

    async def unload(self, model: str) -> None:
        """Returns at once; what it has in flight ends first. One that is not loaded is left so."""
        request = service_pb2.RepositoryModelUnloadRequest(model_name=model)
        await self._call(self._stub.RepositoryModelUnload, request, _UNLOAD_S)

    async def operate(self, generate: str, operation: str, timeout_s: float) -> dict[str, Any]:
        """An operation of a generate model that takes no input, and what it says."""
        request = service_pb2.ModelInferRequest(model_name=generate)
        request.parameters[contracts.OPERATION].string_param = operation
        request.outputs.add(name=contracts.ROWS.name)
        answer = await self._call(self._stub.ModelInfer, request, timeout_s, stage="generate")
        said: dict[str, Any] = orjson.loads(answer.raw_output_contents[0][4:])  # a BYTES element begins with its length
        return said

    async def quiesce(self, orchestrator: str, timeout_s: float) -> None:
        """It calls no stage from then on, and says nothing, not even that: whether it heard does not matter."""
        request = service_pb2.ModelInferRequest(model_name=orchestrator)
        request.parameters[contracts.OPERATION].string_param = "quiesce"
        call = self._stub.ModelStreamInfer(timeout=timeout_s)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(request)
            await call.done_writing()
            async for _ in call:
                pass

    async def probe(self, model: str, stage: str, timeout_s: float) -> None:
        """Returns if the stage's process answers a call that is no work; raises StageError, `lost`, if it does not."""
        if stage == "generate":
            await self.operate(model, "counters", timeout_s)
            return
        request = service_pb2.ModelInferRequest(model_name=model)
        if stage == "preprocess":
            _text_input(request, contracts.TEXT, b"a")
            request.outputs.add(name=contracts.INPUT_IDS.name)
        else:
            _, rows = wire.pack_windows([])
            ids = contracts.OUTPUT_IDS
            request.inputs.add(name=ids.name, datatype=ids.wire_dtype, shape=[0])
            request.raw_input_contents.append(b"")
            _text_input(request, contracts.ROWS, rows)
            request.outputs.add(name=contracts.ROWS.name)
            request.parameters["per_token"].bool_param = False
        await self._call(self._stub.ModelInfer, request, timeout_s, stage=stage)

    async def _call(self, method: Any, request: Any, timeout_s: float, stage: str = "") -> Any:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            details = error.details() or str(error.code())
            unavailable = error.code() is grpc.StatusCode.UNAVAILABLE  # or a model of a Triton that lives
            if _BUSY in details or (unavailable and not await self.live(1.0)):
                raise Away(details) from None
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise StageError(f"Triton did not do it within {timeout_s:g} s", code="unavailable") from None
            if stage:
                raise StageError.from_text(details, stage=stage) from None
            raise StageError(reason_of(details), code="unavailable") from None


def _text_input(request: Any, tensor: contracts.Tensor, text: bytes) -> None:
    request.inputs.add(name=tensor.name, datatype=tensor.wire_dtype, shape=[1])
    request.raw_input_contents.append(len(text).to_bytes(4, "little") + text)


def reason_of(details: str) -> str:
    """The cause, of all that Triton says of a model that cannot be loaded."""
    text = _PLACE.sub("", details.replace("; ", "\n").split("\n\n")[0])
    text = _WHERE.sub("", text).removeprefix("Internal: ").strip()
    return " ".join(text.split())[:500] or "Triton gives no reason"
