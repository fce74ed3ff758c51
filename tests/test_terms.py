"""How urgent and how long: what request parameters say, and what is left after a while."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import StageError
from pipelines.terms import MAX_PRIORITY, MAX_TIMEOUT_MS, Terms


@given(st.integers(-MAX_PRIORITY, MAX_PRIORITY), st.none() | st.integers(1, MAX_TIMEOUT_MS))
def test_they_arrive_as_they_were_sent(priority: int, timeout_ms: int | None) -> None:
    terms = Terms(priority, timeout_ms)
    assert Terms.of({"traceparent": "x", **terms.parameters()}) == terms


def test_defaults_send_nothing() -> None:
    assert Terms().parameters() == {}
    assert Terms.of({"id": "a"}) == Terms()


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"timeout_ms": 0}, "timeout_ms"),
        ({"timeout_ms": "500"}, "timeout_ms"),
        ({"timeout_ms": 1.5}, "timeout_ms"),
        ({"timeout_ms": MAX_TIMEOUT_MS + 1}, "timeout_ms"),
        ({"queue_priority": True}, "queue_priority"),
        ({"queue_priority": 2**40}, "queue_priority"),
    ],
)
def test_a_bad_value_names_its_parameter(parameters: dict[str, Any], param: str) -> None:
    with pytest.raises(StageError, match=param) as caught:
        Terms.of(parameters)
    assert caught.value.param == param


def test_what_is_left() -> None:
    assert Terms(3, 1000).after(0.25) == Terms(3, 750)
    assert Terms(3).after(1e9) == Terms(3)
    with pytest.raises(StageError) as caught:
        Terms(0, 1000).after(1.0)
    assert caught.value.code == "timeout"
