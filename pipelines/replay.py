"""Runs one stage of a recording again, alone, and says where its output differs: no Triton, no gateway.

    python -m pipelines.replay FILE [--stage preprocess|generate|postprocess]

Exit code 0: the same; 1: not the same, or the recording is not one for what is here, and a sentence says why.
"""

from __future__ import annotations

import argparse
import queue
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import contracts
from pipelines.errors import StageError
from pipelines.phases import Phases
from pipelines.pipeline import CatalogError, Pipeline, get_pipeline
from pipelines.recording import COMPILED, MIXED, STEPS, Boundary, Recording, RecordingError
from pipelines.sampling import Sampling
from pipelines.sources import is_pulled


def preprocess(pipeline: Pipeline, recording: Recording) -> Boundary:
    """What preprocess makes of what was asked. A seed that it drew is taken from the recording."""
    from pipelines.preprocess import Preprocess

    asked: dict[str, Any] = dict(recording.asked)
    sampling = Sampling.from_json(asked.pop(contracts.SAMPLING.name))
    seed = sampling.seed if sampling.seed is not None else _sampling(recording).seed
    stage = Preprocess.of(pipeline)
    values = stage.outputs(stage.run(**asked, sampling=replace(sampling, seed=seed).to_json()))
    made: Boundary = {}
    for tensor, value in values.items():
        if tensor is contracts.FEATURES:
            if len(value):
                made[tensor.name] = bytes(value)
        elif tensor is contracts.PICTURES:
            if value != b"[]":
                made[tensor.name] = value.decode()
        else:
            made[tensor.name] = value
    return made


def generate(pipeline: Pipeline, recording: Recording) -> Boundary:
    """What the engine answers to the prompt. Log probabilities are no part of that, so none are asked for."""
    from pipelines.generate import Answer
    from pipelines.operations import load

    features = None
    if packed := recording.prompt.get(contracts.FEATURES.name):
        from pipelines.images.features import unpack

        features = unpack(np.frombuffer(packed, dtype=np.uint8).copy())
    ids = recording.prompt[contracts.INPUT_IDS.name]
    sampling = replace(_sampling(recording), logprobs=False, top_logprobs=0)
    answers: queue.SimpleQueue[Answer | StageError] = queue.SimpleQueue()
    stage = load(pipeline, Phases(), compiled=recording.about.get(STEPS) == COMPILED)
    try:
        stage.generate(ids, sampling, answers.put, features=features)
        answer = answers.get()
    finally:
        stage.close()
    if isinstance(answer, StageError):
        raise answer
    return {contracts.OUTPUT_IDS.name: answer.output_ids, contracts.FINISH_REASON.name: answer.finish_reason}


def postprocess(pipeline: Pipeline, recording: Recording) -> Boundary:
    from pipelines.postprocess import Postprocess

    ids, reason = (recording.answer[tensor.name] for tensor in (contracts.OUTPUT_IDS, contracts.FINISH_REASON))
    text, reason = Postprocess.load(pipeline.home).answer(ids, _sampling(recording).stop, reason)
    return {contracts.GENERATED_TEXT.name: text, contracts.FINISH_REASON.name: reason}


Stage = Callable[[Pipeline, Recording], Boundary]
STAGES: Mapping[str, tuple[Stage, str]] = {  # and the boundary that it makes
    "preprocess": (preprocess, "prompt"),
    "generate": (generate, "answer"),
    "postprocess": (postprocess, "text"),
}


def replay(pipeline: Pipeline, recording: Recording, stage: str) -> list[str]:
    """Where the stage's output differs from the recorded, a line each. Raises RecordingError, StageError."""
    recording.check(pipeline)
    if not is_pulled(pipeline):
        raise RecordingError(f"its weights are not here: run `triptych pull {pipeline.name}`.")
    run, made = STAGES[stage]
    recorded: Boundary = getattr(recording, made)
    if stage == "generate" and recording.about.get(STEPS) == MIXED:
        raise RecordingError("the engine took its compiled step into use while it ran: record it anew.")
    if stage != "preprocess" and not recording.answer.get(contracts.FINISH_REASON.name):
        raise RecordingError("it ends before the answer did: the request was cancelled, or was still running.")
    return list(differences(recorded, run(pipeline, recording)))


def differences(recorded: Boundary, replayed: Boundary) -> list[str]:
    found = []
    for name in sorted({*recorded, *replayed}):
        before, now = recorded.get(name), replayed.get(name)
        if before == now:
            continue
        if before is None or now is None:
            found.append(f"{name}: recorded {_shown(before)}, replayed {_shown(now)}")
            continue
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, now, strict=False)))
        found.append(
            f"{name}: alike in the first {alike}, then recorded {_shown(before[alike : alike + 8])}, replayed "
            f"{_shown(now[alike : alike + 8])} (of {len(before)} and {len(now)})"
        )
    return found


def _sampling(recording: Recording) -> Sampling:
    return Sampling.from_json(recording.prompt[contracts.SAMPLING.name])


def _shown(value: object) -> str:
    return "nothing" if value is None or value in ("", [], b"") else repr(value)[:120]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="triptych replay", description="Run one stage of a recording, and compare.")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--stage", choices=list(STAGES), default="generate")
    given = parser.parse_args(arguments)
    try:
        recording = Recording.from_bytes(Path(given.file).read_bytes())
        pipeline = get_pipeline(str(recording.about.get("pipeline")))
        found = replay(pipeline, recording, given.stage)
    except (RecordingError, CatalogError) as error:
        print(f"triptych: {given.file} cannot be replayed: {error}", file=sys.stderr)
        return 1
    except StageError as error:
        print(f"triptych: {given.stage} fails: {error.message}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"triptych: {given.file} cannot be read: {error.strerror}", file=sys.stderr)
        return 1
    if found:
        print(f"{given.stage} of {pipeline.name} differs from the recording:", *found, sep="\n  ")
        return 1
    _, made = STAGES[given.stage]
    told = ", ".join(f"{name} of {len(value)}" for name, value in getattr(recording, made).items())
    print(f"{given.stage} of {pipeline.name} gives what was recorded: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
