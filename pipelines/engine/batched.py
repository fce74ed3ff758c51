"""The transformers engine: continuous batching of whole steps. A step is: admit, forward, sample, emit.

Who runs on what is `scheduler`'s to say; the forward is `flat`, or `compatible` for a model that cannot be run that
way; drawing is `sampler`. Knows no text and no weights: it is given a model.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pipelines.engine import Counters, Limits, Output, Request
from pipelines.engine.compatible import CompatibleModel
from pipelines.engine.flat import FlatModel, Sample, rounds_inputs
from pipelines.engine.parking import Parking
from pipelines.engine.sampler import BROKEN, Choice, Draw, sample
from pipelines.engine.scheduler import MAX_KEPT, Plan, Row, Scheduler, as_many, by_rectangle
from pipelines.engine.slots import Unsupported, position_bytes
from pipelines.engine.tensors import tensors_of

log = logging.getLogger(__name__)


class Forward(Protocol):
    """A model as the engine uses it, and where its keys and values are."""

    @property
    def name(self) -> str:
        """Which way it is run."""

    compiled: bool  # whether the last forward was compiled code's

    def wait_compiled(self) -> None: ...

    def forward(self, plan: Plan) -> Tensor: ...

    def copy(self, source: int, target: int, length: int) -> None: ...

    def swap(self, one: int, other: int, length: int) -> None: ...

    def settle(self, running: Sequence[Row], kept: Mapping[int, int], capacity: int) -> None: ...

    def clear(self) -> None:
        """Give up all keys and values, while no row is running."""


class BatchedEngine:
    """See `pipelines.engine.Engine`. `kv_bytes` bounds the cache; deadlines are on `clock`.

    `kv_dtype` is what keys and values are kept as; None is what the model computes in, or half of that where it is on
    kernels that round more than that anyway. `compile`: the step is compiled in the background (`compiled`). `sample`
    is what a model that takes pictures is proved with.
    """

    idle_s = 0.0
    can_park = True

    def __init__(
        self,
        model: Any,
        limits: Limits,
        *,
        max_running: int = 64,
        kv_bytes: int = 2**31,
        kv_dtype: torch.dtype | None = None,
        compile: bool = False,
        sample: Sample | None = None,
        parked: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`parked` is a folder for what a parked model's memory is read from again; None: the system's own."""
        model.eval()
        config = model.config.get_text_config()
        if kv_dtype is None and rounds_inputs(model):
            kv_dtype = torch.float16
        capacity = kv_bytes // position_bytes(config, kv_dtype or model.dtype)
        if capacity < 1:
            raise ValueError(f"the key and value cache of {kv_bytes} bytes holds no token of this model")
        self.limits = Limits(min(limits.context, capacity), limits.eos_ids)
        self.counters = Counters()
        self.begun: Sequence[str] = ()
        self.why_not_fast = ""
        self._forward: Forward
        try:
            slots = max_running + MAX_KEPT
            context = self.limits.context
            self._forward = FlatModel(
                model, max_slots=slots, context=context, kv_dtype=kv_dtype, compile=compile, sample=sample
            )
        except Unsupported as why:
            self.why_not_fast = str(why)
            self._forward = CompatibleModel(model)
        self._compiled = self._forward.compiled
        fast = not self.why_not_fast
        self._scheduler = Scheduler(self._forward, capacity, max_running, share=fast, chunked=fast)
        if rounds_inputs(model):  # a step on the kernels is about as long as it has tokens, elsewhere few cost nothing
            self._scheduler.beside = as_many
        if model.device.type != "cpu":  # hundreds of tokens more are hardly a longer step, and memory is taken whole
            self._scheduler.beside, self._scheduler.alone = lambda decoding: max(512, decoding), 8192
            self._scheduler.charge = by_rectangle
        self._parking = Parking(tensors_of(model).values(), parked)
        self._clock = clock
        self._numbers = itertools.count()
        self._refused: list[Output] = []
        self._cancelled: set[str] = set()
        self._in_flight: set[str] = set()
        self._dated: set[str] = set()  # those with a deadline

    @property
    def way(self) -> str:
        """How the model is run: fast, or compatible and why."""
        return f"{self._forward.name}: {self.why_not_fast}" if self.why_not_fast else self._forward.name

    def wait_compiled(self) -> None:
        """Until every step will be compiled code's. Raises `Unsupported` where none will be."""
        self._forward.wait_compiled()

    def submit(self, request: Request) -> None:
        if request.id in self._in_flight:
            raise ValueError(f"a request {request.id!r} is in flight already")
        self._in_flight.add(request.id)
        length, context = len(request.input_ids), self.limits.context
        if not 0 < length < context:  # whoever submits checks this; here it keeps a mistake from being everybody's
            why = f"a prompt of {length} tokens; it takes 1 to {context - 1}"
            self._refused.append(Output(request.id, [], "error", why))
            return
        sampling = request.sampling.with_seed()
        limit = min(context, length + (sampling.max_tokens or context))
        row = Row(request, (request.priority, next(self._numbers)), list(request.input_ids), limit)
        row.draw = Draw(sampling, request.input_ids, self.limits.eos_ids, request.constraint)
        if request.deadline is not None:
            self._dated.add(request.id)
        self._scheduler.submit(row)
        self.counters.waiting += 1

    def cancel(self, request_id: str) -> None:
        if request_id in self._in_flight:
            self._cancelled.add(request_id)

    def park(self) -> None:
        self._parking.park()
        self._scheduler.forget()
        self._forward.clear()

    def wake(self) -> None:
        self._parking.wake()

    @property
    def busy(self) -> bool:
        return bool(self._in_flight)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Admit, forward, sample, emit."""
        began_ns = time.perf_counter_ns()
        outputs = self._leave()
        plan = self._scheduler.plan()
        self.begun = [chunk.row.request.id for chunk in plan.chunks if not chunk.last]
        rows, logits = self._run(plan)
        choices = sample(logits, [row.draw for row in rows]) if rows else []
        outputs += [self._emit(row, choice) for row, choice in zip(rows, choices, strict=True)]
        outputs += [self._failed(row) for row in self._scheduler.running if row.error and not row.finish_reason]
        self._retire(outputs)
        if computed := len(plan.decode) + len(plan.chunks):
            self.counters.step_rows += computed
            self.counters.step_ns += time.perf_counter_ns() - began_ns
        return outputs

    def _leave(self) -> list[Output]:
        """Those that are refused, cancelled or too late."""
        outputs, self._refused = self._refused, []
        if self._cancelled or self._dated:
            now, gone, self._cancelled = self._clock(), self._cancelled, set()
            ended = self._scheduler.end(lambda row: _left(row.request, gone, now))
            outputs += [Output(row.request.id, [], row.finish_reason) for row in sorted(ended)]
        return outputs

    def _run(self, plan: Plan) -> tuple[list[Row], Tensor]:
        """The rows whose next token this gives, and their logits. A row that fails has an error, and it alone."""
        if not plan.decode and not plan.chunks:
            return [], torch.empty(0)
        found, plans = [], [plan]
        while plans:
            part = plans.pop(0)
            rows = part.sampled
            try:
                found.append((rows, self._forward.forward(part)))
            except Exception as error:
                if len(part.decode) + len(part.chunks) > 1:
                    plans = part.alone()
                else:
                    for row in [*part.decode, *(chunk.row for chunk in part.chunks)]:
                        row.error = _named(error)
            else:
                part.advance()
        self.counters.steps += 1
        self.counters.compiled_steps += self._forward.compiled
        if self._forward.compiled != self._compiled:  # it rounds otherwise than what was kept
            self._compiled = self._forward.compiled
            self._scheduler.forget()
        logits = [logits for _, logits in found] or [torch.empty(0)]
        return [row for rows, _ in found for row in rows], logits[0] if len(logits) == 1 else torch.cat(logits)

    def _emit(self, row: Row, choice: Choice) -> Output:
        """The row's new token and whether it is the last one."""
        token = choice.token_id
        if token == BROKEN:
            row.error = row.draw.error or "the model's output is not a number"
            return self._failed(row)
        cached = row.cached_tokens if row.draw.generated == 0 else 0
        row.tokens.append(token)
        self.counters.output_tokens += 1
        try:
            row.draw.accept(token)
            row.finish_reason = self._finish(row, token)
        except Exception as error:
            row.finish_reason, row.error = "error", _named(error)
        logprobs = [] if choice.logprob is None else [choice.logprob]
        return Output(row.request.id, [token], row.finish_reason, row.error, logprobs, cached)

    def _finish(self, row: Row, token: int) -> str:
        request = row.request
        if request.stops_at is not None and request.stops_at(token):
            return "stop"
        if token in self.limits.eos_ids and not request.sampling.ignore_eos:
            return "stop"
        if request.constraint is not None and request.constraint.complete:
            return "stop"
        return "length" if len(row.tokens) >= row.limit else ""

    def _failed(self, row: Row) -> Output:
        row.finish_reason = "error"
        return Output(row.request.id, [], "error", row.error)

    def _retire(self, outputs: Sequence[Output]) -> None:
        """Those with a last output are in flight no more."""
        scheduler, counters = self._scheduler, self.counters
        ended = [output for output in outputs if output.finish_reason]
        if ended:
            scheduler.retire()
            ids = {output.id for output in ended}
            self._in_flight -= ids
            self._dated -= ids
            cancelled = sum(1 for output in ended if output.finish_reason == "cancelled")
            counters.cancelled += cancelled
            counters.finished += len(ended) - cancelled
        self._forward.settle(scheduler.running, scheduler.kept_lengths, scheduler.capacity)
        counters.running, counters.waiting = len(scheduler.running), len(scheduler.waiting)
        counters.prompt_tokens, counters.cached_tokens = scheduler.prompt_tokens, scheduler.cached_tokens
        counters.preempted = scheduler.preempted


def _left(request: Request, cancelled: set[str], now: float) -> str:
    if request.id in cancelled:
        return "cancelled"
    return "timeout" if request.deadline is not None and request.deadline <= now else ""


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
