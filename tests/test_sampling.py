"""The sampling parameters and the one exception: what is taken, what is refused, and by which name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import StageError
from pipelines.sampling import Sampling
from pipelines.structure import Structure


def schema_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **fields}}}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def test_the_openai_names() -> None:
    values = {"max_completion_tokens": 5, "temperature": 0, "top_p": 0.5, "seed": -3, "stop": "end"}
    assert Sampling.parse(values) == Sampling(5, 0.0, 0.5, -3, ("end",))
    assert Sampling.parse({"stop": ["a", "b"], "seed": None}) == Sampling(stop=("a", "b"))


@pytest.mark.parametrize(
    ("values", "param", "says"),
    [
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": True}, "max_tokens", "must be an integer"),
        ({"max_tokens": 1.5}, "max_tokens", "must be an integer"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens", "send one of them"),
        ({"temperature": 2.1}, "temperature", "between 0 and 2"),
        ({"temperature": float("nan")}, "temperature", "must be a number"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"top_p": -0.1}, "top_p", "between 0 and 1"),
        ({"seed": 2**63}, "seed", "below 2**63"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ["a", ""]}, "stop", "empty string"),
        ({"stop": [1]}, "stop", "list of strings"),
        ({"temperature": 10**400}, "temperature", "between 0 and 2"),
        ({"min_tokens": -1}, "min_tokens", "at least 0"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens", "more than max_tokens (2)"),
        ({"min_tokens": 3, "max_completion_tokens": 2}, "min_tokens", "more than max_tokens (2)"),
        ({"ignore_eos": 1}, "ignore_eos", "true or false"),
        ({"top_k": -2}, "top_k", "at least -1"),
        ({"min_p": 1.1}, "min_p", "between 0 and 1"),
        ({"presence_penalty": 2.1}, "presence_penalty", "between -2 and 2"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", "between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "between 0.01 and 100"),
        ({"logit_bias": [1]}, "logit_bias", "must be an object"),
        ({"logit_bias": {"a": 1}}, "logit_bias", 'key "a", which is not a token id'),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"01": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"٣": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "of token 1 must be a number between -100 and 100"),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias", "between -100 and 100"),
        ({"logit_bias": {"1": True}}, "logit_bias", "between -100 and 100"),
        ({"logit_bias": {str(token): 0 for token in range(1025)}}, "logit_bias", "at most 1024"),
        ({"logprobs": 5}, "logprobs", "true or false"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "at most 20"),
        ({"top_logprobs": 3}, "top_logprobs", "needs 'logprobs'"),
        ({"response_format": "json"}, "response_format", "must be an object"),
        ({"response_format": {"type": "yaml"}}, "response_format", "one of text, json_object"),
        ({"response_format": {"type": ["text"]}}, "response_format", "one of text, json_object"),
        ({"response_format": {"type": "text", "regex": "a"}}, "response_format", "does not take 'regex'"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format", "does not take 'schema'"),
        ({"response_format": {"type": "regex"}}, "response_format", "response_format.regex' must be a string"),
        ({"response_format": {"type": "grammar", "grammar": ""}}, "response_format", "not empty"),
        ({"response_format": {"type": "regex", "regex": "a" * 200_000}}, "response_format", "131072 at most"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "an object with a 'schema'"),
        (schema_format(True), "response_format", "must be a JSON schema: an object"),
        (schema_format({}, strict="yes"), "response_format", "strict' must be true or false"),
        (schema_format({}, name="a b"), "response_format", "name' must be 1 to 64"),
        (schema_format({}, description=3), "response_format", "description' must be a string"),
        (schema_format({}, schemas={}), "response_format", "does not take 'schemas'"),
        (schema_format({"const": float("inf")}), "response_format", "NaN or Infinity"),
        (schema_format(nested(70)), "response_format", "nested too deeply"),
        (schema_format(nested(900)), "response_format", "nested too deeply"),
        ({"best_of": 3}, "best_of", "Unsupported parameter: 'best_of'"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(StageError) as error:
        Sampling.parse(values)
    assert error.value.param == param
    assert says in error.value.message


@pytest.mark.parametrize("text", ["{", "[1]", "3", '"x"'])
def test_the_tensor_must_hold_an_object(text: str) -> None:
    with pytest.raises(StageError) as error:
        Sampling.from_json(text)
    assert error.value.param == "sampling"


def test_all_and_nothing_have_more_than_one_name() -> None:
    assert Sampling.parse({"top_k": -1}) == Sampling.parse({"top_k": 0}) == Sampling()
    assert Sampling.parse({"response_format": {"type": "text"}}) == Sampling()


def test_a_bias_is_in_the_order_of_its_ids() -> None:
    assert Sampling.parse({"logit_bias": {"10": 1, "9": -100}}).logit_bias == ((9, -100.0), (10, 1.0))


def test_a_schema_keeps_its_order_and_loses_its_name() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    structure = Sampling.parse(schema_format(schema, strict=True, description="d")).response_format
    assert structure == Structure("json_schema", '{"type":"object","properties":{"b":{},"a":{}}}')


def test_a_value_too_deep_to_be_shown_is_refused_all_the_same() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(StageError, match="must be a number, not a list"):
        Sampling.parse({"temperature": deep})


STRUCTURES = st.one_of(
    st.none(),
    st.just(Structure("json_object")),
    st.builds(Structure, st.sampled_from(["regex", "grammar"]), st.text(min_size=1, max_size=20)),
    st.just(Structure("json_schema", '{"type":"object","properties":{"b":{},"a":{"const":"\\ud83d\\ude00"}}}')),
)
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.none() | st.integers(100, 2**63 - 1),
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(st.text(min_size=1), max_size=4).map(tuple),
    min_tokens=st.integers(0, 100),
    ignore_eos=st.booleans(),
    top_k=st.integers(0, 2**63 - 1),
    min_p=st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.01, 100),
    logit_bias=st.dictionaries(st.integers(0, 10**6), st.floats(-100, 100)).map(lambda b: tuple(sorted(b.items()))),
    logprobs=st.just(True),
    top_logprobs=st.integers(0, 20),
    response_format=STRUCTURES,
)


@given(SAMPLINGS)
def test_it_survives_the_way_through_the_stages(sampling: Sampling) -> None:
    assert Sampling.from_json(sampling.to_json()) == sampling


def test_the_defaults_are_not_sent() -> None:
    assert Sampling().to_json() == "{}"


def test_a_seed_is_drawn_once() -> None:
    drawn = Sampling().with_seed()
    assert drawn.seed is not None
    assert drawn.with_seed() == drawn
    assert Sampling().with_seed() != drawn


def test_an_error_survives_a_string() -> None:
    error = StageError('not "that"', code="context_length_exceeded", param="messages", stage="preprocess")
    around = f"in ensemble 'x', {error.to_json()} (at 3)"
    back = StageError.from_text(around, stage="generate")
    assert (back.message, back.code, back.param, back.stage) == (
        error.message,
        error.code,
        error.param,
        error.stage,
    )


@pytest.mark.parametrize("text", ["Tensor is missing", '{"message": 3', '{"message": "x"}'])
def test_a_foreign_error_is_internal_to_its_stage(text: str) -> None:
    error = StageError.from_text(text, stage="generate")
    assert (error.code, error.stage) == ("internal", "generate")


def test_a_model_that_is_not_there_is_named_so() -> None:
    for text in (
        "Request for unknown model: 'echo-orchestrator' has no available versions",
        "Error when running inference: Failed for execute the inference request. Model 'echo-generate' is not ready.",
    ):
        assert StageError.from_text(text, stage="generate").lost
    assert not StageError.from_text("out of memory", stage="generate").lost


def test_an_unhealthy_stub_is_named_so() -> None:
    text = "Stub process 'echo-preprocess_0_0' is not healthy."
    assert StageError.from_text(text, stage="preprocess").code == "unhealthy"
