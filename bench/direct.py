"""Calls to Triton over gRPC without the gateway, as its users make them. Knows the contracts, no HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as grpc_aio

from bench.client import Result
from pipelines import contracts

_OUTPUTS = (contracts.GENERATED_TEXT.name, contracts.FINISH_REASON.name)


class Direct:
    """One gRPC channel to Triton."""

    def __init__(self, address: str) -> None:
        self._client = grpc_aio.InferenceServerClient(address)

    async def close(self) -> None:
        await self._client.close()

    async def ensemble(self, pipeline: str, prompt: str, max_tokens: int, timeout: float) -> Result:
        """One request, one answer."""
        result = Result(started=time.perf_counter())
        model = contracts.model_name(pipeline, "ensemble")

        async def call() -> None:
            answer = await self._client.infer(model, _inputs(prompt, max_tokens), outputs=_outputs())
            _note(answer, result)

        return await _watched(call(), result, timeout)

    async def orchestrator(self, pipeline: str, prompt: str, max_tokens: int, timeout: float) -> Result:
        """One request, a stream of deltas."""
        result = Result(started=time.perf_counter())
        request = {
            "model_name": contracts.model_name(pipeline, "orchestrator"),
            "inputs": _inputs(prompt, max_tokens),
            "outputs": _outputs(),
        }

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield request

        async def call() -> None:
            async for answer, error in self._client.stream_infer(requests()):
                if error is not None:
                    raise error
                _note(answer, result)
                if result.finish_reason:
                    return
            result.error = "no finish_reason"

        return await _watched(call(), result, timeout)


async def _watched(call: Any, result: Result, timeout: float) -> Result:
    try:
        await asyncio.wait_for(call, timeout)
    except asyncio.TimeoutError:
        result.error = "timeout"
    except Exception as error:  # tritonclient raises its own and grpc's
        result.error = f"grpc: {type(error).__name__}: {str(error)[:80]}"
    result.ended = time.perf_counter()
    return result


def _note(answer: Any, result: Result) -> None:
    now = time.perf_counter()
    text, finish_reason = (answer.as_numpy(name)[0].decode() for name in _OUTPUTS)
    if text:
        result.events += 1
        result.first = result.first or now
        result.last = now
    result.finish_reason = finish_reason or None


def _inputs(prompt: str, max_tokens: int) -> list[Any]:
    values = {contracts.PROMPT: prompt, contracts.SAMPLING: json.dumps({"max_tokens": max_tokens})}
    inputs = []
    for tensor, value in values.items():
        entry = grpc.InferInput(tensor.name, [1], tensor.wire_dtype)
        entry.set_data_from_numpy(np.array([value.encode()], dtype=np.object_))
        inputs.append(entry)
    return inputs


def _outputs() -> list[Any]:
    return [grpc.InferRequestedOutput(name) for name in _OUTPUTS]
