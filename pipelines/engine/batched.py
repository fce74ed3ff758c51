"""The transformers engine: any causal language model, continuous batching of whole steps.

New requests are prefilled one prompt a forward; all that run are decoded as one batch, a token each. Knows no
text, no clock and no weights: it is given a model. Its KV cache is `slots`, its drawing `sampler`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pipelines.engine import Counters, Limits, Output, Request
from pipelines.engine.sampler import BROKEN, sample
from pipelines.engine.slots import SlotCache, Unsupported
from pipelines.sampling import Sampling

# A step takes in prompts of this many tokens, or one longer one: whoever runs already waits that long.
PREFILL_TOKENS = 512


@dataclass(eq=False)
class _Row:
    """One running request. Its slot is its place among the running."""

    request: Request
    sampling: Sampling
    limit: int  # tokens to generate at most
    generated: int = 0
    last_token: int = 0
    finish_reason: str = ""
    error: str = ""

    @property
    def cached(self) -> int:
        """Positions in its slot: all but the last token, which the next forward writes."""
        return len(self.request.input_ids) + self.generated - 1


_Batches: TypeAlias = list[tuple[list[_Row], Tensor]]  # rows, and the logits of each


class BatchedEngine:
    """See `pipelines.engine.Engine`. `threads` sets torch's, for the whole process; 0 leaves them be.

    Raises `Unsupported` for a model whose layers it cannot batch, rather than answer wrongly.
    """

    idle_s = 0.0

    def __init__(self, model: Any, limits: Limits, *, max_running: int = 64, threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.limits = limits
        self.max_running = max_running
        self.counters = Counters()
        self._model = model.eval()
        self._slots = SlotCache(model.config.get_text_config(), max_slots=max_running, context=limits.context)
        self._waiting: deque[Request] = deque()
        self._running: list[_Row] = []
        self._cancelled: set[str] = set()
        self._in_flight: set[str] = set()
        self._prove()

    def submit(self, request: Request) -> None:
        if request.id in self._in_flight:
            raise ValueError(f"a request {request.id!r} is in flight already")
        self._in_flight.add(request.id)
        self._waiting.append(request)
        self.counters.waiting += 1

    def cancel(self, request_id: str) -> None:
        if request_id in self._in_flight:
            self._cancelled.add(request_id)

    @property
    def busy(self) -> bool:
        return bool(self._in_flight)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Admit, forward, sample, emit."""
        outputs = self._drop_cancelled()
        decoding = self._running.copy()
        prompts = self._admit(outputs)
        batches = self._decode(decoding) + self._prefill(prompts)
        tokens = self._sample(batches)
        outputs += [self._emit(row, tokens.get(row)) for row in self._running]
        self._retire()
        return outputs

    def _admit(self, outputs: list[Output]) -> list[_Row]:
        """First come, first served, while there are rows and the step's prompts are not too long together."""
        prompts: list[_Row] = []
        budget = PREFILL_TOKENS
        while self._waiting and len(self._running) < self.max_running:
            length = len(self._waiting[0].input_ids)
            if prompts and length > budget:
                break
            request = self._waiting.popleft()
            if not 0 < length < self.limits.context:
                outputs.append(self._refuse(request))
                continue
            budget -= length
            room = self.limits.context - length
            row = _Row(request, request.sampling.with_seed(), min(request.sampling.max_tokens or room, room))
            prompts.append(row)
            self._running.append(row)
            self.counters.prompt_tokens += length
        return prompts

    def _decode(self, rows: list[_Row]) -> _Batches:
        """One token a row, in one forward. If that fails then one by one, to find whose failure it is."""
        if not rows:
            return []
        try:
            return [(rows, self._forward_tokens(0, rows))]
        except Exception:
            return [batch for slot, row in enumerate(rows) for batch in self._alone(slot, row)]

    def _alone(self, slot: int, row: _Row) -> _Batches:
        try:
            return [([row], self._forward_tokens(slot, [row]))]
        except Exception as error:
            row.error = _named(error)
            return []

    def _prefill(self, prompts: list[_Row]) -> _Batches:
        """One prompt a forward, into the slots behind those that are decoded."""
        batches: _Batches = []
        first = len(self._running) - len(prompts)
        for slot, row in enumerate(prompts, first):
            try:
                batches.append(([row], self._forward_prompt(slot, row.request.input_ids)))
            except Exception as error:
                row.error = _named(error)
        return batches

    def _forward_prompt(self, slot: int, input_ids: Sequence[int]) -> Tensor:
        self._reserve(slot + 1, len(input_ids))
        self._slots.prefill(slot, len(input_ids))
        ids = torch.tensor([list(input_ids)], device=self._model.device)
        return self._forward(ids, torch.arange(ids.shape[1], device=ids.device)[None], None)

    def _forward_tokens(self, first: int, rows: list[_Row]) -> Tensor:
        positions = [row.cached for row in rows]
        self._reserve(first + len(rows), max(positions) + 1)
        ids = torch.tensor([[row.last_token] for row in rows], device=self._model.device)
        at = self._slots.decode(first, positions, ids.device)
        return self._forward(ids, at[:, None], self._slots.masks(self._model.dtype))

    def _forward(self, input_ids: Tensor, position_ids: Tensor, mask: Any) -> Tensor:
        """The logits of each row's last position, [rows, vocabulary]."""
        logits: Tensor = self._model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=self._slots,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def _reserve(self, slots: int, length: int) -> None:
        used = max(row.cached + 1 for row in self._running)  # a prompt of this very step has no token yet
        self._slots.reserve(slots, length, rows=len(self._running), used=used)

    def _sample(self, batches: _Batches) -> dict[_Row, int]:
        if not batches:
            return {}
        self.counters.steps += 1
        rows = [row for batch, _ in batches for row in batch]
        logits = batches[0][1] if len(batches) == 1 else torch.cat([logits for _, logits in batches])
        tokens = sample(logits, [row.sampling for row in rows], [row.generated for row in rows])
        return dict(zip(rows, tokens, strict=True))

    def _emit(self, row: _Row, token: int | None) -> Output:
        """The row's new token and whether it is the last one; a row whose forward failed has none."""
        if token is None or token == BROKEN:
            row.finish_reason, row.error = "error", row.error or "the model's output is not a number"
            return Output(row.request.id, [], "error", row.error)
        row.generated += 1
        row.last_token = token
        self.counters.output_tokens += 1
        try:
            stopped = row.request.stops_at is not None and row.request.stops_at(token)
        except Exception as error:
            row.finish_reason, row.error = "error", _named(error)
        else:
            if stopped or token in self.limits.eos_ids:
                row.finish_reason = "stop"
            elif row.generated >= row.limit:
                row.finish_reason = "length"
        return Output(row.request.id, [token], row.finish_reason, row.error)

    def _drop_cancelled(self) -> list[Output]:
        if not self._cancelled:
            return []
        gone, self._cancelled = self._cancelled, set()
        self._waiting = deque(request for request in self._waiting if request.id not in gone)
        for row in self._running:
            if row.request.id in gone:
                row.finish_reason = "cancelled"
        self._in_flight -= gone
        self.counters.cancelled += len(gone)
        self._retire()
        return [Output(request_id, [], "cancelled") for request_id in sorted(gone)]

    def _refuse(self, request: Request) -> Output:
        """Whoever submits checks this first; here it keeps a mistake from being everybody's."""
        self._in_flight.discard(request.id)
        self.counters.finished += 1
        length, context = len(request.input_ids), self.limits.context
        return Output(request.id, [], "error", f"a prompt of {length} tokens; it takes 1 to {context - 1}")

    def _retire(self) -> None:
        """Take out the rows that ended; the last row moves into each slot that falls free."""
        for slot in reversed(range(len(self._running))):
            row = self._running[slot]
            if not row.finish_reason:
                continue
            last = self._running.pop()
            if last is not row:
                self._running[slot] = last
                self._slots.move(len(self._running), slot, last.cached)
            if row.finish_reason != "cancelled":
                self._in_flight.discard(row.request.id)
                self.counters.finished += 1
        if not self._running:
            self._slots.clear()
        self.counters.running, self.counters.waiting = len(self._running), len(self._waiting)

    @torch.inference_mode()
    def _prove(self) -> None:
        """Two prompts of unequal length, as one batch, must give what the model gives without a cache."""
        kind = self._model.config.model_type
        exact = self._model.dtype == torch.float32 and not getattr(self._model, "rounds_inputs", False)
        prompts, any_way = [[3, 4, 5, 6, 7], [8, 9, 10]], Sampling()
        rows = [_Row(Request("", ids[:-1], any_way), any_way, 1, 1, ids[-1]) for ids in prompts]
        try:
            for slot, row in enumerate(rows):
                self._running.append(row)
                self._forward_prompt(slot, row.request.input_ids)
            batched = self._forward_tokens(0, rows).float()
            tensors = [torch.tensor([ids], device=self._model.device) for ids in prompts]
            plain = torch.cat([self._model(input_ids=ids, use_cache=False).logits[:, -1] for ids in tensors])
        except Exception as error:
            raise Unsupported(f"{kind} cannot be run as a batch: {_named(error)}") from error
        finally:
            self._running.clear()
            self._slots.clear()
        off = float((batched - plain.float()).abs().max() / plain.float().abs().max())
        if not off < (0.001 if exact else 0.2):  # a wrong mask or position is off by the size of the logits
            raise Unsupported(f"{kind} answers differently as a batch: its logits are off by {off:.1%}")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
