"""transformers as a peer, in two ways: `generate` with all streams in one batch, and its continuous batching.

Its own modules with the weights of the same file; greedy, no answer ends by itself. Knows nothing of our engine but
the loader, which is asked for a dtype by name and so gives a model as transformers made it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from bench import worker

_PAGE = 256  # tokens of a page of continuous batching's cache: its default
_LONGEST = 1024  # tokens, prompt and answer together


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Asked after every token whether to stop: never, but it notes the time."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Handlers:
    def __init__(self) -> None:
        self._model: Any = None
        self._streams = 1
        self._continuous = False

    def load(
        self,
        *,
        threads: int,
        streams: int,
        continuous: bool,
        home: str | None = None,
        dtype: str = "float32",
        shape: str | None = None,
        device: str = "cpu",
    ) -> dict[str, Any]:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        if shape:
            from bench import shapes

            self._model = shapes.random_model(shape, device)
        else:
            from pipelines.engine.weights import load

            assert home is not None
            self._model, _ = load(Path(home), dtype=dtype, device=device)
        self._continuous, self._streams = continuous, streams
        self._model.config.eos_token_id = None
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        return {
            "load_s": time.perf_counter() - started,
            "version": transformers.__version__,
            "how": f"{'generate_batch' if continuous else 'generate, all streams in one batch'}, {dtype}",
        }

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        if self._continuous:
            return {"at_once": True, "times": [found.timestamps for found in self._generate_batch(prompts, tokens)]}
        return {"at_once": True, "times": [self._generate(prompts, tokens)] * len(prompts)}

    def prefill(self, prompt: list[int]) -> float:
        if self._continuous:
            (found,) = self._generate_batch([prompt], 1)
            return float(found.timestamps[0] - found.created_time)
        started = time.perf_counter()
        return self._generate([prompt], 1)[0] - started

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], tokens: int) -> list[float]:
        clock = _Clock()
        ids = torch.tensor(prompts, device=self._model.device)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        if len(clock.times) != tokens:
            raise RuntimeError(f"generate made {len(clock.times)} tokens of {tokens}")
        return clock.times

    def _generate_batch(self, prompts: list[list[int]], tokens: int) -> list[Any]:
        """A manager for each call, whose start, compiling and graphs are outside the times it notes."""
        pages = -(-_LONGEST // _PAGE) + self._streams * -(-512 // _PAGE)
        config = ContinuousBatchingConfig(num_blocks=pages, page_size=_PAGE, allow_block_sharing=False)
        found = self._model.generate_batch(
            prompts,
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=config,
            record_timestamps=True,
        )
        results = list(found.values())
        if len(results) != len(prompts) or any(len(result.timestamps or ()) != tokens for result in results):
            errors = sorted({result.error for result in results if result.error}) or "tokens are missing"
            raise RuntimeError(f"generate_batch did not finish {len(prompts)} streams: {errors}")
        return results


if __name__ == "__main__":
    peer = Handlers()
    worker.serve({"load": peer.load, "decode": peer.decode, "prefill": peer.prefill})
