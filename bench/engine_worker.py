"""Our engine as a peer. Knows the engine's four calls, and where a model comes from; no Triton and no HTTP.

For a shape nothing is imported that needs more than torch and transformers.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from bench import worker
from pipelines.engine import Limits, Output, Request
from pipelines.engine.batched import BatchedEngine
from pipelines.sampling import Sampling

_LONGEST = 512  # tokens of a stream, with what it is ahead when the last one begins


class Handlers:
    def __init__(self) -> None:
        self._engine: Any = None
        self._count = 0

    def load(
        self,
        *,
        threads: int,
        streams: int,
        home: str | None = None,
        dtype: str = "auto",
        shape: str | None = None,
        device: str = "cpu",
        context: int = 0,
    ) -> dict[str, Any]:
        """From a pipeline's `home`, or of a `shape`. `context` is where `step_bytes` are counted."""
        torch.set_num_threads(threads)
        started = time.perf_counter()
        info: dict[str, Any] = {}
        room: dict[str, Any] = {}
        if shape:
            from bench import shapes

            model = shapes.random_model(shape, device)
            limits = Limits(context=model.config.max_position_embeddings, eos_ids=frozenset())
            room["kv_bytes"] = streams * _LONGEST * shapes.position_bytes(model)
            info["step_bytes"] = shapes.step_bytes(model, context)
        else:
            from pipelines.engine.weights import load

            assert home is not None
            model, found = load(Path(home), dtype=dtype, device=device)
            limits = Limits(context=found.context, eos_ids=frozenset())  # no answer ends by itself
        self._engine = BatchedEngine(model, limits, max_running=streams, compile=not shape, **room)
        return {**info, "load_s": time.perf_counter() - started}

    def copy_bandwidth(self, device: str) -> float:
        from bench import shapes

        return shapes.copy_bandwidth(device)

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Until every stream has its tokens. None ends before: the others would be faster without it."""
        most = 2 * tokens + 4 * len(prompts) + 64  # the first may be ahead by a step a prompt, or two
        times: dict[str, list[float]] = {self._submit(prompt, most): [] for prompt in prompts}
        while min(map(len, times.values())) < tokens:
            for output in self._step():
                times[output.id] += [time.perf_counter()] * len(output.token_ids)
        self._clear(times)
        return {"at_once": True, "times": list(times.values())}

    def prefill(self, prompt: list[int]) -> float:
        request_id = self._submit(prompt, 2)
        started = time.perf_counter()
        while not any(output.token_ids for output in self._step()):
            pass
        seconds = time.perf_counter() - started
        self._clear([request_id])
        return seconds

    def _submit(self, prompt: list[int], tokens: int) -> str:
        self._count += 1
        request = Request(str(self._count), prompt, Sampling(max_tokens=tokens, temperature=0))
        self._engine.submit(request)
        return request.id

    def _step(self) -> list[Output]:
        outputs: list[Output] = self._engine.step()
        for output in outputs:
            if output.finish_reason not in ("", "length"):
                raise RuntimeError(f"a request ended with {output.finish_reason}: {output.error}")
        return outputs

    def _clear(self, ids: Any) -> None:
        for request_id in ids:
            self._engine.cancel(request_id)
        while self._engine.busy:
            self._engine.step()


if __name__ == "__main__":
    peer = Handlers()
    worker.serve(
        {
            "load": peer.load,
            "decode": peer.decode,
            "prefill": peer.prefill,
            "copy_bandwidth": peer.copy_bandwidth,
        }
    )
