"""What the generate model is asked to do, and the engine a pipeline names. Knows no Triton.

Without an operation a request is one prompt answered whole (the ensemble). The orchestrator's are `submit`, `poll`
and `cancel` (DESIGN §3); `counters` is for whoever wants to see the engine work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import orjson

from pipelines import contracts, wire
from pipelines.contracts import Asked, Tensor, Values
from pipelines.engine import Engine
from pipelines.engine.limits import read_limits
from pipelines.errors import StageError
from pipelines.generate import Answer, Generate, Poll
from pipelines.pipeline import Pipeline
from pipelines.postprocess import Postprocess
from pipelines.sampling import Sampling


def load(pipeline: Pipeline) -> Generate:
    """The stage of a pipeline, its engine loaded and its threads running."""
    return Generate(load_engine(pipeline), stop_checker=Postprocess.load(pipeline.home).stop_checker)


def load_engine(pipeline: Pipeline) -> Engine:
    if pipeline.engine == "echo":
        from pipelines.engine.echo import EchoEngine

        limits = read_limits(pipeline.home)
        limits = replace(limits, context=pipeline.context or limits.context)
        return EchoEngine(limits, tokens_per_s=pipeline.echo_tokens_per_s, max_running=pipeline.max_running)
    # torch takes seconds to import: only where it is used
    import torch

    from pipelines.engine import weights
    from pipelines.engine.batched import BatchedEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, limits = weights.load(pipeline.home, dtype=pipeline.dtype, quantize=pipeline.quantize, device=device)
    limits = replace(limits, context=pipeline.context or limits.context)
    return BatchedEngine(model, limits, max_running=pipeline.max_running)


def operate(stage: Generate, asked: Asked, answer: Callable[[Values | StageError], None]) -> None:
    """Do what one request asks; `answer` is called once, now or later, from any thread."""
    if asked.operation == "poll":
        stage.poll(int(asked.parameters["wait_ms"]) / 1000, lambda poll: answer(_poll(poll)))
    elif asked.operation == "submit":
        id, sampling = str(asked.parameters["id"]), Sampling.from_json(asked.text(contracts.SAMPLING) or "{}")
        stage.submit(id, _prompt(asked), sampling, traceparent=asked.traceparent)
        answer(_said(submitted=id))
    elif asked.operation == "cancel":
        answer(_said(cancelled=stage.cancel(str(asked.parameters["id"]))))
    elif asked.operation == "counters":
        answer(_said(**stage.counters()))
    elif not asked.operation:
        sampling = Sampling.from_json(asked.text(contracts.SAMPLING) or "{}")
        stage.generate(
            _prompt(asked),
            sampling,
            lambda whole: answer(_whole(whole)),
            name=asked.id,
            traceparent=asked.traceparent,
        )
    else:
        raise StageError(f"unknown operation {asked.operation!r}", param=contracts.OPERATION, stage="generate")


def _prompt(asked: Asked) -> list[int]:
    ids = asked.ids(contracts.INPUT_IDS)
    if not ids:
        raise StageError("'input_ids' must hold at least one token.", param="input_ids", stage="generate")
    return ids


def _poll(poll: Poll) -> Values:
    ids, rows = wire.pack_poll(poll)
    return {contracts.OUTPUT_IDS: ids, contracts.ROWS: rows}


def _whole(whole: Answer | StageError) -> Values | StageError:
    if isinstance(whole, StageError):
        return whole
    return {contracts.OUTPUT_IDS: whole.output_ids, contracts.FINISH_REASON: whole.finish_reason}


def _said(**facts: Any) -> Mapping[Tensor, Any]:
    return {contracts.ROWS: orjson.dumps(facts)}
