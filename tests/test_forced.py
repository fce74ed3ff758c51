"""Calls that must be made, by the default pipeline's own model: 135 million parameters that know no tools."""

import json
import queue

import pytest

from pipelines import operations
from pipelines.answer.deltas import Arguments, Call, Content
from pipelines.errors import StageError
from pipelines.phases import Phases
from pipelines.pipeline import get_pipeline
from pipelines.postprocess import Postprocess
from pipelines.preprocess import Preprocess
from pipelines.tools import load_tools
from tests.test_forced_calls import SCHEMAS, check

OFFERED = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]


@pytest.fixture(scope="module")
def generate(smollm2_home):
    stage = operations.load(get_pipeline("smollm2-135m-instruct"), Phases())
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def answer(generate, smollm2_home):
    before, after = Preprocess.load(smollm2_home, context=2048), Postprocess.load(smollm2_home)

    def answer(prompt: str, seed: int, sampling: dict, **choice: object) -> tuple[list, str]:
        """What its three stages and the reader make of a prompt at temperature 1."""
        tools = json.dumps({"tools": OFFERED, **choice})
        asked = json.dumps({"max_tokens": 96, "temperature": 1, "seed": seed, **sampling})
        prepared = before.run(prompt=prompt, tools=tools, sampling=asked)
        answers: queue.Queue = queue.Queue()
        generate.generate(prepared.input_ids, prepared.sampling, answers.put)
        found = answers.get(timeout=120)
        if isinstance(found, StageError):
            raise found
        parser = before.form.parser(load_tools(tools))
        assert parser is not None
        return [*parser.push(after.full(found.output_ids)), *parser.finish()], found.finish_reason

    return answer


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_function_is_called_once_with_arguments_that_fit(answer, name):
    for seed in range(2):
        choice = {"type": "function", "function": {"name": name}}
        deltas, reason = answer("Do it for red, please.", seed, {}, tool_choice=choice)
        assert [delta.name for delta in deltas if isinstance(delta, Call)] == [name]
        assert not [delta for delta in deltas if isinstance(delta, Content)]
        if reason == "stop":  # a number has no last digit, and a small model may not find one
            check(SCHEMAS[name], json.loads("".join(delta.text for delta in deltas if isinstance(delta, Arguments))))


def test_some_function_is_called_and_only_once_if_that_is_asked(answer):
    ended = 0
    for seed in range(4):
        deltas, reason = answer(
            "What time is it?", seed, {"temperature": 0.5}, tool_choice="required", parallel_tool_calls=False
        )
        (call,) = [delta for delta in deltas if isinstance(delta, Call)]
        if reason == "stop":
            arguments = "".join(delta.text for delta in deltas if isinstance(delta, Arguments))
            check(SCHEMAS[call.name], json.loads(arguments))
            ended += 1
    assert ended


def test_an_answer_of_a_shape_or_a_call(answer):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    sampling = {"response_format": {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema}}}
    for seed in range(3):
        deltas, reason = answer("Are you well?", seed, sampling, parallel_tool_calls=False)
        content = "".join(delta.text for delta in deltas if isinstance(delta, Content))
        calls = [delta for delta in deltas if isinstance(delta, Call)]
        assert bool(content) != bool(calls)
        if content and reason == "stop":
            assert isinstance(json.loads(content)["ok"], bool)
