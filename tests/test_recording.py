"""What a request gave each stage and got: recorded within bounds, written, and replayed where it matches."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pipelines import replay
from pipelines.chat import Event, Prompt
from pipelines.contracts import FEATURES, INPUT_IDS, PICTURES
from pipelines.generate import Row
from pipelines.pipeline import Pipeline, get_pipeline
from pipelines.preprocess import Preprocess
from pipelines.recorder import Recorder
from pipelines.recording import Recording, RecordingError
from pipelines.sources import pull
from tests.product import Product
from tests.test_cli import triptych
from tests.test_stack import ask

SPAN = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"
TRACEPARENT = f"00-{SPAN}-01"


@pytest.fixture(scope="session")
def echo() -> Pipeline:
    pipeline = get_pipeline("echo")
    pull(pipeline)
    return pipeline


def recorded(pipeline: Pipeline, inputs: dict[str, Any], sampling: str) -> Recording:
    """By the recorder, from what the stages themselves make of it."""
    stage = Preprocess.of(pipeline)
    values = stage.outputs(stage.run(**inputs, sampling=sampling))
    pictures = json.loads(values.get(PICTURES, "[]"))
    features = values[FEATURES] if pictures else None
    prompt = Prompt(values[INPUT_IDS], stage.run(**inputs, sampling=sampling).sampling.to_json(), features, pictures)
    if "image" in inputs:
        inputs = {**inputs, "image": np.frombuffer(inputs["image"], dtype=np.uint8).copy()}
    recorder = Recorder(pipeline, 1, 10**8)
    recorder.began("h", "a.1", TRACEPARENT, inputs, sampling, prompt)
    begun = Recording.from_bytes(recorder.recording(SPAN))
    answer = replay.generate(pipeline, begun)
    begun.answer = answer
    text = replay.postprocess(pipeline, begun)
    half = len(answer["output_ids"]) // 2
    recorder.told(Row("h", answer["output_ids"][:half]), Event("a.1", [text["generated_text"][:3]]))
    rest = Row("h", answer["output_ids"][half:], answer["finish_reason"])
    recorder.told(rest, Event("a.1", [text["generated_text"][3:]], text["finish_reason"]))
    return Recording.from_bytes(recorder.recording(SPAN))


@pytest.fixture(scope="session")
def of_echo(echo: Pipeline) -> Recording:
    return recorded(echo, {"prompt": "Hi there, who are you?"}, '{"max_tokens": 12, "stop": ["zzz"]}')


@pytest.mark.parametrize("stage", replay.STAGES)
def test_a_stage_gives_again_what_was_recorded(echo: Pipeline, of_echo: Recording, stage: str) -> None:
    assert len(of_echo.answer["output_ids"]) == 12
    assert replay.replay(echo, of_echo, stage) == []


def test_a_stage_that_sees_gives_again_what_was_recorded() -> None:
    shapes = get_pipeline("shapes-vlm")
    pull(shapes)
    image = (Path(__file__).parent.parent / "docs" / "shapes-example.png").read_bytes()
    recording = recorded(shapes, {"prompt": "Where is the square?", "image": image}, '{"temperature": 0}')
    assert recording.text["generated_text"] == "The square is on the right."
    assert len(recording.prompt["features"]) > 1000
    assert recording.asked["image"] == image
    for stage in replay.STAGES:
        assert replay.replay(shapes, recording, stage) == []


def test_where_it_differs_is_said(echo: Pipeline, of_echo: Recording) -> None:
    ids = list(of_echo.answer["output_ids"])
    ids[5] += 1
    other = replace(of_echo, answer={**of_echo.answer, "output_ids": ids}, text={**of_echo.text, "finish_reason": "x"})
    (found,) = replay.replay(echo, other, "generate")
    assert found.startswith(f"output_ids: alike in the first 5, then recorded [{ids[5]}, ")
    assert [line.split(":")[0] for line in replay.replay(echo, other, "postprocess")] == [
        "finish_reason",
        "generated_text",
    ]
    shorter = replace(of_echo, prompt={**of_echo.prompt, "input_ids": of_echo.prompt["input_ids"][:-1]})
    (found,) = replay.replay(echo, shorter, "preprocess")
    count = len(of_echo.prompt["input_ids"])
    assert f"alike in the first {count - 1}, then recorded nothing" in found
    assert f"of {count - 1} and {count}" in found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pipeline", "another"),
        ("source", "path:elsewhere"),
        ("weights", "0" * 64),
        ("contracts", "0" * 16),
        ("quantize", "int8"),
        ("chat_template", "{{ messages }}"),
    ],
)
def test_what_does_not_match_is_not_run(echo: Pipeline, of_echo: Recording, key: str, value: str) -> None:
    other = replace(of_echo, about={**of_echo.about, key: value})
    with pytest.raises(RecordingError, match=rf"recorded with {key} = '{value[:5]}.*record it anew"):
        replay.replay(echo, other, "generate")


def test_an_answer_without_an_end_is_not_compared(echo: Pipeline, of_echo: Recording) -> None:
    cut = replace(of_echo, answer={"output_ids": [1, 2]})
    assert replay.replay(echo, cut, "preprocess") == []
    for stage in ("generate", "postprocess"):
        with pytest.raises(RecordingError, match="ends before the answer did"):
            replay.replay(echo, cut, stage)


def test_a_file_of_another_version_or_none_is_refused(of_echo: Recording) -> None:
    good = of_echo.to_bytes()
    assert Recording.from_bytes(good) == of_echo
    with np.load(io.BytesIO(good)) as file:
        arrays = dict(file)

    def changed(about: dict[str, Any], others: dict[str, Any] | None = None) -> bytes:
        told = json.dumps({**json.loads(arrays["about"].tobytes()), **about}).encode()
        out = io.BytesIO()
        np.savez(out, **{**arrays, "about": np.frombuffer(told, dtype=np.uint8), **(others or {})})
        return out.getvalue()

    assert Recording.from_bytes(changed({})).answer == of_echo.answer
    with pytest.raises(RecordingError, match="of version 3, and this Triptych reads version 2"):
        Recording.from_bytes(changed({"version": 3}))
    pickled = np.array([{"a": 1}], dtype=object)
    strange = {"prompt.input_ids": np.array([[1.5]])}
    unreadable = (changed({}, strange), changed({}, {"about": pickled}))
    for bad in (b"", b"PK", good[:-40], changed({"format": "x"}), *unreadable):
        with pytest.raises(RecordingError, match="no recording"):
            Recording.from_bytes(bad)


def test_the_recorder_keeps_the_last_within_its_bounds(echo: Pipeline) -> None:
    def spans(recorder: Recorder) -> list[int]:
        return [number for number in range(8) if recorder.recording(f"{SPAN[:-1]}{number}")]

    def begin(recorder: Recorder, number: int) -> None:
        parent = f"00-{SPAN[:-1]}{number}-01"
        recorder.began(f"h{number}", f"a.{number}", parent, {"prompt": "x" * 1000}, "{}", Prompt([1, 2], "{}"))

    few, small = Recorder(echo, 3, 10**6), Recorder(echo, 100, 5000)
    for number in range(6):
        begin(few, number)
        begin(small, number)
    assert spans(few) == [3, 4, 5]
    assert spans(small) == [2, 3, 4, 5]
    small.told(Row("h5", list(range(300))), Event("a.5", ["y"]))  # an answer takes room too
    assert spans(small) == [4, 5]
    small.told(Row("h0", [1]), Event("a.0", ["y"]))  # it is not there any more
    few.began("h", "a", None, {"prompt": "x"}, "{}", Prompt([1], "{}"))  # nothing to ask for it by
    assert spans(few) == [3, 4, 5]
    assert Recorder.of(echo, {}) is None
    assert Recorder.of(echo, {"TRIPTYCH_RECORD": "0"}) is None


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [((7, 0), (9, 0), "plain"), ((7, 3), (9, 5), "compiled"), ((7, 3), (9, 4), "mixed"), ((7, 7), (2, 0), "mixed")],
)
def test_how_steps_were_made_is_recorded(
    echo: Pipeline, before: tuple[int, int], after: tuple[int, int], steps: str
) -> None:
    recorder = Recorder(echo, 1, 10**6)
    recorder.polled(dict(zip(("steps", "compiled_steps"), before, strict=True)))
    recorder.began("h", "a", TRACEPARENT, {"prompt": "x"}, "{}", Prompt([1], "{}"))
    recorder.polled(dict(zip(("steps", "compiled_steps"), after, strict=True)))
    recorder.told(Row("h", [1], "stop"), Event("a", ["y"], "stop"))
    recording = Recording.from_bytes(recorder.recording(SPAN))
    assert recording.about["steps"] == steps
    if steps == "mixed":
        with pytest.raises(RecordingError, match="took its compiled step into use"):
            replay.replay(echo, recording, "generate")


def test_of_several_choices_the_first_is_given(echo: Pipeline) -> None:
    recorder = Recorder(echo, 9, 10**6)
    for id in ("a.ff", "a.100", "a.fe"):
        recorder.began(id, id, TRACEPARENT, {"prompt": "x"}, "{}", Prompt([1], "{}"))
    assert Recording.from_bytes(recorder.recording(SPAN)).about["id"] == "a.fe"


@pytest.mark.parametrize("model", ["echo", "smollm2-135m-instruct"])
def test_a_request_is_recorded_and_replayed_offline(product: Product, tmp_path: Path, model: str) -> None:
    body = {"model": model, "messages": ask("Name two rivers."), "max_tokens": 24, "temperature": 0.7, "stop": ["zzz"]}
    file = tmp_path / "it.recording"
    for turn in ("first", "second"):
        headers = {"x-request-id": f"record-{model}-{turn}"}
        answer = httpx.post(f"{product.url}/v1/chat/completions", json=body, headers=headers, timeout=120).json()
        done = triptych("record", "--trace", f"record-{model}-{turn}", str(file), "--url", product.url)
        assert (done.returncode, done.stderr) == (0, "")
        recording = Recording.from_bytes(file.read_bytes())
        if recording.about["steps"] != "mixed":  # which is so once: while the compiled step is taken into use
            break
    assert recording.text["generated_text"] == answer["choices"][0]["message"]["content"]
    assert len(recording.answer["output_ids"]) == answer["usage"]["completion_tokens"]
    assert len(recording.prompt["input_ids"]) == answer["usage"]["prompt_tokens"]
    for stage in ("preprocess", "generate", "postprocess"):
        again = subprocess.run(
            [sys.executable, "-m", "gateway.cli", "replay", str(file), "--stage", stage],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "TRIPTYCH_CACHE": str(product.cache)},
        )
        assert (again.returncode, again.stdout.split("\n")[0][: len(stage)]) == (0, stage), again.stdout + again.stderr


def test_a_file_that_cannot_be_replayed_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"nothing")
    for file, why in (("it", "no recording"), ("gone", "No such file")):
        done = triptych("replay", str(tmp_path / file))
        assert (done.returncode, why in done.stderr, len(done.stderr.splitlines())) == (1, True, 1)
