"""The sampling parameters and the one exception: what is taken, what is refused, and by which name."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.errors import StageError
from pipelines.sampling import Sampling


def test_the_openai_names() -> None:
    given = {"max_completion_tokens": 5, "temperature": 0, "top_p": 0.5, "seed": -3, "stop": "end"}
    assert Sampling.parse(given) == Sampling(5, 0.0, 0.5, -3, ("end",))
    assert Sampling.parse({"stop": ["a", "b"], "seed": None}) == Sampling(stop=("a", "b"))


@pytest.mark.parametrize(
    ("given", "param", "says"),
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
        ({"top_k": 3}, "top_k", "Unsupported parameter: 'top_k'"),
    ],
)
def test_a_bad_value_is_named(given: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(StageError) as error:
        Sampling.parse(given)
    assert error.value.param == param
    assert says in error.value.message


@pytest.mark.parametrize("text", ["{", "[1]", "3", '"x"'])
def test_the_tensor_must_hold_an_object(text: str) -> None:
    with pytest.raises(StageError) as error:
        Sampling.from_json(text)
    assert error.value.param == "sampling"


def test_it_survives_the_way_through_the_stages() -> None:
    sampling = Sampling(7, 0.3, 0.9, 11, ("a", "\n"))
    assert Sampling.from_json(sampling.to_json()) == sampling
    assert Sampling.from_json(Sampling().to_json()) == Sampling()


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


def test_an_unhealthy_stub_is_named_so() -> None:
    text = "Stub process 'echo-preprocess_0_0' is not healthy."
    assert StageError.from_text(text, stage="preprocess").code == "unhealthy"
