"""llama.cpp as a peer, in its own environment: greedy decoding through llama_cpp's low-level calls.

`Llama.generate` and `create_completion` would add Python's part of sampling and detokenizing to every token, which is
not what is compared; llama.cpp's greedy sampler walks an array of structs, where numpy's argmax of the logits takes a
tenth of its time. So a token here is one `llama_decode` and one argmax. Streams run one after the other, as
llama-cpp-python's interface has them.
"""

from __future__ import annotations

import time
from typing import Any

import llama_cpp  # type: ignore[import-not-found, unused-ignore]
import numpy as np

from bench import worker

_CONTEXT = 2048
_MICRO_BATCH = 512  # llama.cpp's default


class _Llama:
    def __init__(self, gguf: str, threads: int) -> None:
        self._model = llama_cpp.Llama(
            gguf,
            n_ctx=_CONTEXT,
            n_batch=_CONTEXT,
            n_ubatch=_MICRO_BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
        )
        self._memory = llama_cpp.llama_get_memory(self._model.ctx)
        self._vocabulary = self._model.n_vocab()

    def stream(self, prompt: list[int], tokens: int) -> list[float]:
        """The times of `tokens` tokens; before the first there is the prompt."""
        llama_cpp.llama_memory_clear(self._memory, False)
        times, token = [], self._decode(prompt)
        times.append(time.perf_counter())
        for _ in range(tokens - 1):
            token = self._decode([token])
            times.append(time.perf_counter())
        return times

    def _decode(self, ids: list[int]) -> int:
        context = self._model.ctx
        array = (llama_cpp.llama_token * len(ids))(*ids)  # the batch only points to it
        if code := llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise RuntimeError(f"llama_decode of {len(ids)} tokens failed with {code}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(self._vocabulary,))
        return int(logits.argmax())


class Handlers:
    def __init__(self) -> None:
        self._llama: Any = None

    def load(self, gguf: str, threads: int) -> dict[str, Any]:
        started = time.perf_counter()
        self._llama = _Llama(gguf, threads)
        return {
            "load_s": time.perf_counter() - started,
            "version": llama_cpp.__version__,
            "kernels": llama_cpp.llama_print_system_info().decode().strip(),
            "how": "llama_decode and numpy's argmax, flash attention, streams one after the other",
        }

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        return {"at_once": False, "times": [self._llama.stream(prompt, tokens) for prompt in prompts]}

    def prefill(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        return float(self._llama.stream(prompt, 1)[0] - started)


if __name__ == "__main__":
    peer = Handlers()
    worker.serve({"load": peer.load, "decode": peer.decode, "prefill": peer.prefill})
