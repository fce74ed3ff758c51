"""The echo engine: what it answers, its pace, its ends, and that it is fast enough to be a null engine."""

import json

import pytest

from pipelines.engine import Limits, Output, Request
from pipelines.engine.echo import EchoEngine
from pipelines.engine.limits import read_limits
from pipelines.sampling import Sampling
from pipelines.structure import Structure

EOS = 2


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def engine(context=64, **options):
    return EchoEngine(Limits(context=context, eos_ids=frozenset({EOS})), **options)


def drain(driven):
    """All outputs until the engine has nothing left, merged by request."""
    merged: dict[str, Output] = {}
    while driven.busy:
        for output in driven.step():
            known = merged.setdefault(output.id, Output(output.id))
            assert not known.finish_reason, "an output after the last one"
            known.token_ids += output.token_ids
            known.finish_reason, known.error = output.finish_reason, output.error
    return merged


def answer(prompt, sampling, stops_at=None, **options):
    driven = engine(**options)
    driven.submit(Request("a", prompt, sampling, stops_at))
    output = drain(driven)["a"]
    return output.token_ids, output.finish_reason


def test_without_max_tokens_it_echoes_once_and_ends_as_a_model_would():
    assert answer([5, 6, 7], Sampling()) == ([5, 6, 7, EOS], "stop")


def test_with_max_tokens_it_repeats_until_then():
    assert answer([5, 6, 7], Sampling(max_tokens=7)) == ([5, 6, 7, 5, 6, 7, 5], "length")


def test_an_end_token_in_the_prompt_is_echoed_and_ends_nothing():
    assert answer([5, EOS, 7], Sampling(max_tokens=4)) == ([5, EOS, 7, 5], "length")
    assert answer([5, EOS, 7], Sampling()) == ([5, EOS, 7, EOS], "stop")


def test_the_context_bounds_prompt_and_answer_together():
    assert answer([5, 6, 7], Sampling(max_tokens=9), context=5) == ([5, 6], "length")
    assert answer([5, 6, 7], Sampling(), context=6) == ([5, 6, 7], "length")
    assert answer([5, 6, 7], Sampling(), context=3) == ([], "length")


def test_a_stop_string_ends_it_with_the_token_that_completes_it():
    assert answer([5, 6, 7], Sampling(max_tokens=9), lambda token_id: token_id == 6) == ([5, 6], "stop")
    assert answer([5, 6], Sampling(max_tokens=2), lambda token_id: token_id == 6) == ([5, 6], "stop")


def test_a_broken_stops_at_is_the_error_of_its_request_alone():
    driven = engine()
    driven.submit(Request("bad", [5, 6], Sampling(), lambda token_id: bool(1 // 0)))
    driven.submit(Request("good", [5, 6], Sampling()))
    outputs = drain(driven)
    assert (outputs["bad"].finish_reason, outputs["bad"].error[:17]) == ("error", "ZeroDivisionError")
    assert outputs["good"].finish_reason == "stop"


def test_counters_and_the_bound_on_running():
    driven = engine(max_running=2)
    for name in "abc":
        driven.submit(Request(name, [5, 6], Sampling(max_tokens=2)))
    assert driven.counters.waiting == 3
    assert [output.id for output in driven.step()] == ["a", "b"]
    assert (driven.counters.running, driven.counters.waiting) == (2, 1)
    drain(driven)
    counters = driven.counters
    assert (counters.running, counters.waiting, counters.finished, counters.cancelled) == (0, 0, 3, 0)
    assert (counters.prompt_tokens, counters.output_tokens, counters.steps) == (6, 6, 4)
    assert counters.step_rows == 6
    assert counters.step_ns > 0


def test_cancel_running_waiting_and_unknown():
    driven = engine(max_running=1)
    for name in "ab":
        driven.submit(Request(name, [5], Sampling(max_tokens=50)))
    driven.step()
    for name in ("a", "b", "nobody"):
        driven.cancel(name)
    assert driven.step() == [Output("a", [], "cancelled"), Output("b", [], "cancelled")]
    assert not driven.busy
    assert (driven.counters.cancelled, driven.counters.finished) == (2, 0)
    assert driven.step() == []


def test_an_id_in_flight_is_refused_and_free_again_afterwards():
    driven = engine()
    driven.submit(Request("a", [5], Sampling()))
    with pytest.raises(ValueError, match="in flight"):
        driven.submit(Request("a", [5], Sampling()))
    drain(driven)
    driven.submit(Request("a", [5], Sampling()))


def test_a_pace_gives_what_is_due_and_says_how_long_to_wait():
    clock = Clock()
    driven = engine(tokens_per_s=10, clock=clock)
    assert driven.idle_s == 0
    driven.submit(Request("a", [5, 6, 7], Sampling(max_tokens=20)))
    assert driven.idle_s == 0
    assert driven.step() == [Output("a", [5])]
    assert driven.step() == []
    assert driven.idle_s == pytest.approx(0.1)
    assert driven.counters.steps == 1
    clock.now += 0.35  # a late driver gets all that is due at once
    assert driven.step() == [Output("a", [6, 7, 5])]
    assert driven.idle_s == pytest.approx(0.05)
    driven.cancel("a")
    assert driven.idle_s == 0


def test_with_a_pace_a_step_is_for_all_and_whoever_comes_meanwhile_takes_part_in_the_next():
    clock = Clock()
    driven = engine(tokens_per_s=10, clock=clock)
    driven.submit(Request("a", [5, 6], Sampling(max_tokens=20)))
    driven.step()
    clock.now += 0.04
    driven.submit(Request("b", [7, 8], Sampling(max_tokens=20)))
    assert driven.step() == []
    assert driven.idle_s == pytest.approx(0.06)
    clock.now += 0.06
    assert driven.step() == [Output("a", [6]), Output("b", [7])]
    clock.now += 0.25  # late by two steps, in which the third was not there
    driven.submit(Request("c", [9], Sampling(max_tokens=20)))
    assert driven.step() == [Output("a", [5, 6]), Output("b", [8, 7])]
    clock.now += 0.05
    assert driven.step() == [Output("a", [5]), Output("b", [8]), Output("c", [9])]
    assert driven.counters.steps == 4


def test_the_pace_can_be_changed_while_it_runs():
    clock = Clock()
    driven = engine(tokens_per_s=1, clock=clock)
    driven.submit(Request("a", [5], Sampling(max_tokens=50)))
    driven.step()
    driven.tokens_per_s = 100
    clock.now += 1.055
    assert len(driven.step()[0].token_ids) == 6
    driven.tokens_per_s = 0
    assert driven.idle_s == 0
    assert len(driven.step()[0].token_ids) == 1


def write(home, **files):
    for name, content in files.items():
        (home / f"{name}.json").write_text(json.dumps(content))
    return home


def test_limits_take_the_end_tokens_that_any_file_names(tmp_path):
    write(
        tmp_path,
        config={"max_position_embeddings": 32, "eos_token_id": 9},
        generation_config={"eos_token_id": [1, 106]},
        tokenizer_config={"eos_token": "<end>", "added_tokens_decoder": {"7": {"content": "<end>"}}},
    )
    assert read_limits(tmp_path) == Limits(32, frozenset({1, 106, 7}))
    (tmp_path / "generation_config.json").unlink()
    assert read_limits(tmp_path) == Limits(32, frozenset({9, 7}))


def test_limits_ask_the_tokenizer_when_no_file_gives_the_id(tmp_path):
    model = {"type": "WordLevel", "vocab": {"<end>": 0}, "unk_token": "<end>"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model}
    write(
        tmp_path,
        config={"text_config": {"max_position_embeddings": 16}},
        tokenizer_config={"eos_token": {"content": "<end>"}},
        tokenizer=tokenizer,
    )
    assert read_limits(tmp_path) == Limits(16, frozenset({0}))


@pytest.mark.parametrize("config", [{}, {"hidden_size": 1}])
def test_a_config_without_a_context_is_an_error_that_names_the_file(tmp_path, config):
    with pytest.raises(ValueError, match=r"config\.json"):
        read_limits(write(tmp_path, config=config))


def test_it_is_certain_of_what_it_repeats():
    driven = engine()
    driven.submit(Request("a", [5, 6], Sampling(max_tokens=3, logprobs=True, top_logprobs=7)))
    driven.submit(Request("b", [5, 6], Sampling(max_tokens=1, logprobs=True)))
    found = {"a": [], "b": []}
    while driven.busy:
        for output in driven.step():
            found[output.id] += output.logprobs
    assert found["a"] == [(5, 0.0, [(5, 0.0)]), (6, 0.0, [(6, 0.0)]), (5, 0.0, [(5, 0.0)])]
    assert found["b"] == [(5, 0.0, [])]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": Structure("json_object")},
        {"logit_bias": ((5, 1.0),)},
        {"presence_penalty": 1.0},
        {"frequency_penalty": -1.0},
        {"repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_what_it_cannot_do_is_an_error_and_not_dropped(fields):
    driven = engine()
    driven.submit(Request("a", [5, 6], Sampling(max_tokens=3, **fields)))
    driven.submit(Request("b", [5, 6], Sampling(max_tokens=3, top_k=5, min_p=0.1)))
    found = drain(driven)
    (name,) = fields
    assert (found["a"].token_ids, found["a"].finish_reason) == ([], "error")
    assert f"'{name}' cannot be applied" in found["a"].error
    assert (found["b"].token_ids, found["b"].finish_reason) == ([5, 6, 5], "length")


def test_an_end_comes_after_min_tokens_or_never():
    assert answer([5, 6], Sampling(min_tokens=5)) == ([5, 6, 5, 6, 5, EOS], "stop")
    assert answer([5, 6], Sampling(ignore_eos=True), context=6) == ([5, 6, 5, 6], "length")


def test_the_lowest_priority_number_goes_first_and_a_deadline_ends_whoever_runs_or_waits():
    clock = Clock()
    driven = engine(max_running=1, tokens_per_s=10, clock=clock)
    driven.submit(Request("runs", [5, 6], Sampling(max_tokens=50), deadline=clock.now + 2))
    driven.step()
    driven.submit(Request("later", [5, 6], Sampling(max_tokens=1), priority=1))
    driven.submit(Request("late", [5, 6], Sampling(max_tokens=1), deadline=clock.now + 0.05))
    driven.submit(Request("first", [5, 6], Sampling(max_tokens=1), priority=-1))
    assert driven.idle_s == pytest.approx(0.05)
    clock.now += 1
    assert [(output.id, output.finish_reason) for output in driven.step()] == [("late", "timeout"), ("runs", "")]
    clock.now += 1
    outputs = [(output.id, output.finish_reason) for output in driven.step()]
    assert outputs == [("runs", "timeout"), ("first", "length")]
    assert [output.id for output in driven.step()] == ["later"]
    assert (driven.counters.finished, driven.counters.cancelled) == (4, 0)
