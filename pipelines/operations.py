"""What the generate model is asked to do, and the engine a pipeline names. Knows no Triton.

Without an operation a request is one prompt answered whole (the ensemble). The orchestrator's are `submit`, `poll`
and `cancel` (DESIGN §3); `counters` is for whoever wants to see the engine work. `state`, `park` and `wake` are the
lifecycle's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from pipelines import contracts, wire
from pipelines.answer.formats import AnswerFormat
from pipelines.contracts import Asked, Tensor, Values
from pipelines.engine import Engine, Limits, snapshot
from pipelines.engine.limits import read_limits
from pipelines.errors import StageError
from pipelines.generate import Answer, Generate, Poll
from pipelines.images.gate import Gate
from pipelines.phases import Phases
from pipelines.pipeline import Pipeline, cache_dir
from pipelines.postprocess import Postprocess
from pipelines.sampling import Sampling
from pipelines.terms import Terms
from pipelines.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pipelines.engine.flat import Sample
    from pipelines.images.features import Features

log = logging.getLogger(__name__)
_compiling = ThreadPoolExecutor(2, "structures")
_with_pictures = ThreadPoolExecutor(64, "pictures")  # as many as the orchestrator submits at once


def load(pipeline: Pipeline, phases: Phases, *, compiled: bool | None = None) -> Generate:
    """The stage of a pipeline, its engine loaded and its threads running.

    `compiled`: None takes compiled steps once there are some; True waits for them, and False does without.
    """
    vocabulary = Vocabulary.load(pipeline.home)
    stop_checker = Postprocess(vocabulary, AnswerFormat.load(pipeline.home).marks).stop_checker
    room = Gate(pipeline.image_memory_mb << 20)
    if pipeline.engine in ("echo", "query"):  # neither can be held to a structure
        engine = load_engine(pipeline, phases)
        return Generate(engine, stop_checker=stop_checker, room=room, phases_s=phases.seconds)
    from pipelines.constraint import Constraints

    # Before the weights, so that it is read for them while those are.
    constraints = Constraints(vocabulary, read_limits(pipeline.home).eos_ids)
    engine = load_engine(pipeline, phases, compiled=compiled)
    return Generate(engine, stop_checker=stop_checker, constraint=constraints, room=room, phases_s=phases.seconds)


def load_engine(pipeline: Pipeline, phases: Phases, *, compiled: bool | None = None) -> Engine:
    if pipeline.engine == "echo":
        from pipelines.engine.echo import EchoEngine

        phases.end("import")
        limits = read_limits(pipeline.home)
        limits = replace(limits, context=pipeline.context or limits.context)
        return EchoEngine(limits, tokens_per_s=pipeline.echo_tokens_per_s, max_running=pipeline.max_running)
    reading = None if pipeline.engine == "query" else _snapshot(pipeline)
    # torch takes seconds to import: only where it is used, and no more of it than that
    from pipelines.engine.lean import complete_torch, import_torch, import_transformers

    if reading:
        import_torch()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if pipeline.engine == "query":
        from pipelines.engine.query import load_query_engine

        complete_torch()

        phases.end("import")
        queried = load_query_engine(
            pipeline.home,
            Limits(pipeline.context, frozenset()),  # its code makes the prompt and ends the answer
            trust_remote_code=pipeline.trust_remote_code,
            dtype=pipeline.dtype,
            device=device,
        )
        phases.end("weights")
        return queried
    import_transformers(*(reading.modules if reading else ()))
    from pipelines.engine.batched import BatchedEngine
    from pipelines.engine.slots import Unsupported

    phases.end("import")
    model = _kept(reading, device)
    if model is None:
        complete_torch()
        model = _converted(pipeline, device)
    limits = read_limits(pipeline.home)
    limits = replace(limits, context=pipeline.context or limits.context)
    phases.end("weights")
    engine = BatchedEngine(
        model,
        limits,
        max_running=pipeline.max_running,
        kv_bytes=pipeline.kv_cache_mb * 10**6 or _share_of_memory(device),
        compile=compiled is not False,
        sample=_sample(pipeline),
        parked=cache_dir() / "parked",
    )
    if engine.why_not_fast:  # the model's own code, all of it
        complete_torch()
    if compiled:
        try:
            engine.wait_compiled()
        except Unsupported as why:
            raise StageError(f"its steps shall be compiled ones, and {why}", stage="generate") from None
    phases.end("warm_up")
    pipeline.way_file.parent.mkdir(parents=True, exist_ok=True)
    pipeline.way_file.write_text(engine.way)
    log.info("%s runs %s, in %s", pipeline.name, engine.way, str(model.dtype).removeprefix("torch."))
    return engine


def _snapshot(pipeline: Pipeline) -> snapshot.Reading | None:
    """The model as it was kept by an earlier load, being read from now on."""
    try:
        return snapshot.Reading(kept_at(pipeline))
    except FileNotFoundError:
        return None
    except snapshot.SnapshotError as error:
        log.warning("%s is loaded anew: %s", pipeline.name, error)
        return None


def kept_at(pipeline: Pipeline) -> Path:
    """Where its model is kept as it is in memory, once it has been loaded; its files must be there."""
    return snapshot.place(pipeline.home, pipeline.dtype, pipeline.quantize, pictures=pipeline.takes_images)


def _kept(reading: snapshot.Reading | None, device: str) -> Any:
    if reading is None or device != "cpu":
        return None
    try:
        return reading.model()
    except snapshot.SnapshotError as error:
        log.warning("the model is loaded anew: %s", error)
        return None


def _converted(pipeline: Pipeline, device: str) -> Any:
    """From its own files; kept as it is then, where that was work."""
    from pipelines.engine import weights
    from pipelines.engine.lean import without_compiler

    with without_compiler():
        model, _ = weights.load(
            pipeline.home,
            dtype=pipeline.dtype,
            quantize=pipeline.quantize,
            device=device,
            device_map=pipeline.device_map,
            pictures=pipeline.takes_images,
        )
    if device == "cpu" and (pipeline.quantize or any(pipeline.home.glob("*.gguf"))):
        snapshot.write(kept_at(pipeline), model)
    return model


def _sample(pipeline: Pipeline) -> Sample | None:
    """What a model that takes pictures is proved with: as its own preprocess stage makes one."""
    if not pipeline.takes_images:
        return None
    from pipelines.engine.flat import Sample
    from pipelines.preprocess import Preprocess

    prepared = Preprocess.of(pipeline).sample()
    assert prepared.features is not None
    return Sample(prepared.input_ids, prepared.features.arrays)


def _share_of_memory(device: str) -> int:
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    import torch

    return torch.cuda.mem_get_info()[0] // 2


def operate(stage: Generate, asked: Asked, answer: Callable[[Values | StageError], None]) -> None:
    """Do what one request asks; `answer` is called once, now or later, from any thread."""
    if asked.operation == "poll":
        stage.poll(int(asked.parameters["wait_ms"]) / 1000, lambda poll: answer(_poll(poll)))
    elif asked.operation == "submit":
        id, sampling = str(asked.parameters["id"]), Sampling.from_json(asked.text(contracts.SAMPLING) or "{}")
        prompt, terms, traceparent = _prompt(asked), Terms.of(asked.parameters), asked.traceparent
        features = _features(asked)

        def submit() -> None:
            stage.submit(id, prompt, sampling, asked=terms, traceparent=traceparent, features=features)
            answer(_said(submitted=id))

        _start(sampling, features, submit, answer)
    elif asked.operation == "cancel":
        answer(_said(cancelled=stage.cancel(str(asked.parameters["id"]))))
    elif asked.operation == "counters":
        answer(_said(**stage.counters()))
    elif asked.operation == "state":
        answer(_said(**asdict(stage.state())))
    elif asked.operation == "park":
        stage.park(lambda done: answer(done if isinstance(done, StageError) else _said(parked=True, park_s=done)))
    elif asked.operation == "wake":
        stage.wake(lambda done: answer(done if isinstance(done, StageError) else _said(woken=True, wake_s=done)))
    elif not asked.operation:
        sampling = Sampling.from_json(asked.text(contracts.SAMPLING) or "{}")
        prompt, terms, name, traceparent = _prompt(asked), Terms.of(asked.parameters), asked.id, asked.traceparent
        features = _features(asked)

        def whole(answered: Answer | StageError) -> None:
            answer(_whole(answered))

        def generate() -> None:
            stage.generate(prompt, sampling, whole, name=name, asked=terms, traceparent=traceparent, features=features)

        _start(sampling, features, generate, answer)
    else:
        raise StageError(f"unknown operation {asked.operation!r}", param=contracts.OPERATION, stage="generate")


def _start(
    sampling: Sampling,
    features: Features | None,
    start: Callable[[], None],
    answer: Callable[[Values | StageError], None],
) -> None:
    """Now, or aside where it takes a while: a structure is compiled, pictures wait for room. No poll shall wait."""
    if sampling.response_format is None and features is None:
        start()
        return

    def started() -> None:
        try:
            start()
        except StageError as error:
            answer(error)
        except Exception as error:
            answer(StageError(f"{type(error).__name__}: {error}", code="internal", stage="generate"))

    (_with_pictures if features else _compiling).submit(started)


def _prompt(asked: Asked) -> list[int]:
    ids = asked.ids(contracts.INPUT_IDS)
    if not ids:
        raise StageError("'input_ids' must hold at least one token.", param="input_ids", stage="generate")
    return ids


def _features(asked: Asked) -> Features | None:
    """None for a prompt without pictures, which preprocess says by an empty tensor."""
    packed = asked.data(contracts.FEATURES)
    if packed is None or not packed.size:
        return None
    from pipelines.images.features import unpack

    return unpack(packed)


def _poll(poll: Poll) -> Values:
    ids, rows = wire.pack_poll(poll)
    return {contracts.OUTPUT_IDS: ids, contracts.ROWS: rows}


def _whole(whole: Answer | StageError) -> Values | StageError:
    if isinstance(whole, StageError):
        return whole
    return {contracts.OUTPUT_IDS: whole.output_ids, contracts.FINISH_REASON: whole.finish_reason}


def _said(**facts: Any) -> Mapping[Tensor, Any]:
    return {contracts.ROWS: orjson.dumps(facts)}
