"""Which endpoint is chosen: rules for cases, and properties for whatever may happen, in any order."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.prefixes import LEAST_SHARED, LONGEST, SHORTEST, Prefixes, beginnings
from gateway.routing import FACTOR, FAILURES, MAX_PAUSE_S, PAUSE_S, SLACK, Route, Router

IDLE = {"a": 0, "b": 0, "c": 0}


def prompt(text: str):
    return beginnings({"text": text})


def router(*endpoints: str) -> Router:
    return Router(endpoints or tuple(IDLE))


def lose(chosen: Router, endpoint: str, now: float = 0.0) -> None:
    assert chosen.lost(Route(endpoint), now)


# Beginnings.


@given(st.text(min_size=SHORTEST, max_size=2000), st.text(max_size=2000))
def test_what_goes_on_shares_its_beginnings(text: str, more: str) -> None:
    shorter, longer = prompt(text), prompt(text + more)
    assert longer.found[: len(shorter.found)] == shorter.found
    assert shorter.found[-1].length > len(text.encode()) * 2 // 3 - 1  # to a third


@given(st.binary(min_size=1000, max_size=2000), st.integers(0, 999), st.integers(1, 255))
def test_what_differs_shares_only_what_comes_before(data: bytes, at: int, by: int) -> None:
    other = data[:at] + bytes(((data[at] + by) % 256,)) + data[at + 1 :]
    one, two = beginnings({"messages": data}).found, beginnings({"messages": other}).found
    assert {each.length for each in one if each in two} == {each.length for each in one if each.length <= at}


def test_a_short_prompt_has_none_and_a_long_one_few() -> None:
    assert prompt("x" * (SHORTEST - 1)).found == []
    assert prompt("x" * 10_000_000) == prompt("x" * LONGEST)
    assert len(prompt("x" * LONGEST).found) < 20


def test_text_bytes_and_ids_are_taken() -> None:
    assert beginnings({"text": "é" * 100}) == beginnings({"messages": ("é" * 100).encode()})
    assert beginnings({"text_ids": [1, 2, 3] * 50}).found
    tools = beginnings({"messages": "m" * 100, "tools": "t" * 100})
    assert tools == prompt("t" * 100 + "m" * 100)


def test_a_conversation_is_known_again() -> None:
    prefixes, messages = Prefixes(), [{"role": "user", "content": "a question of some length, as people put them"}]
    prefixes.remember(prompt(json.dumps(messages)), "a")
    for turn in range(20):
        messages += [{"role": "assistant", "content": f"answer {turn}"}, {"role": "user", "content": f"and {turn}?"}]
        asked = prompt(json.dumps(messages))
        assert prefixes.find(asked) == "a"
        prefixes.remember(asked, "a")


def test_a_greeting_in_common_is_no_home() -> None:
    prefixes, greeting = Prefixes(), "x" * SHORTEST
    prefixes.remember(prompt(greeting), "a")
    assert prefixes.find(prompt(greeting + "y" * SHORTEST)) == "a"
    assert prefixes.find(prompt(greeting + "y" * int(SHORTEST / LEAST_SHARED))) is None


@given(st.lists(st.tuples(st.text(min_size=40, max_size=300), st.sampled_from("abc"))))
def test_memory_is_bounded_and_the_last_is_known(asked: list[tuple[str, str]]) -> None:
    prefixes = Prefixes(capacity=20)
    for text, endpoint in asked:
        prefixes.remember(prompt(text), endpoint)
        assert len(prefixes) <= 20
        assert prefixes.find(prompt(text)) == (endpoint if prompt(text).found else None)


# Routes.


def test_the_idlest_has_the_next() -> None:
    assert router().choose(prompt("?"), {"a": 3, "b": 1, "c": 2}, 0).endpoint == "b"


def test_of_the_equal_each_has_its_turn() -> None:
    chosen = router()
    assert [chosen.choose(prompt("?"), IDLE, 0).endpoint for _ in range(6)] == ["a", "b", "c"] * 2


def test_a_prompt_goes_where_its_beginning_went_until_that_is_much_busier() -> None:
    chosen, asked = router(), prompt("x" * 500)
    home = chosen.choose(asked, IDLE, 0).endpoint
    for load in range(SLACK + 1):
        assert chosen.choose(asked, {**IDLE, home: load}, 0).endpoint == home
    away = chosen.choose(asked, {**IDLE, home: SLACK + 1}, 0).endpoint
    assert away != home
    assert chosen.choose(asked, IDLE, 0).endpoint == away  # it is warm there now
    busy = {"a": 20, "b": 20, "c": 20, away: int(SLACK + 20 * FACTOR)}
    assert chosen.choose(asked, busy, 0).endpoint == away


def test_what_lost_a_request_is_left_alone_and_then_tried_by_one() -> None:
    chosen = router("a", "b")
    lose(chosen, "a")
    for _ in range(5):
        assert chosen.choose(prompt("?"), {"a": 0, "b": 3}, PAUSE_S * 0.9).endpoint == "b"
    probe = chosen.choose(prompt("?"), {"a": 0, "b": 0}, PAUSE_S)
    assert probe.endpoint == "a"
    assert chosen.choose(prompt("?"), {"a": 0, "b": 3}, PAUSE_S).endpoint == "b"  # one at a time
    chosen.succeeded(probe)
    assert chosen.choose(prompt("?"), {"a": 0, "b": 3}, PAUSE_S).endpoint == "a"


def test_pauses_grow_and_end_with_a_success() -> None:
    chosen, now, pause = router("a", "b"), 0.0, PAUSE_S
    lose(chosen, "a")
    for _ in range(30):
        assert chosen.choose(prompt("?"), {"a": 0, "b": 9}, now + pause * 0.99).endpoint == "b"
        now += pause
        probe = chosen.choose(prompt("?"), {"a": 0, "b": 9}, now)
        assert probe.endpoint == "a"
        assert chosen.lost(probe, now)
        pause = min(MAX_PAUSE_S, pause * 2)
    assert pause == MAX_PAUSE_S
    chosen.succeeded(chosen.choose(prompt("?"), {"a": 0, "b": 9}, now + pause))
    lose(chosen, "a", now)
    assert chosen.choose(prompt("?"), {"a": 0, "b": 9}, now + PAUSE_S).endpoint == "a"


def test_a_lane_full_of_losses_is_one_ejection() -> None:
    chosen = router("a", "b")
    assert [chosen.lost(Route("a"), 0.0) for _ in range(100)] == [True] + [False] * 99
    assert chosen.choose(prompt("?"), {"a": 0, "b": 9}, PAUSE_S).endpoint == "a"


def test_failures_in_a_row_eject_and_others_do_not() -> None:
    chosen = router("a", "b")
    for _ in range(10):
        assert not any(chosen.failed(Route("a"), 0.0) for _ in range(FAILURES - 1))
        chosen.succeeded(Route("a"))
    assert [chosen.failed(Route("a"), 0.0) for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]


def test_a_late_success_of_an_ejected_one_is_none() -> None:
    chosen, early = router("a", "b"), Route("a")
    lose(chosen, "a")
    chosen.succeeded(early)
    assert chosen.ejected("a")


def test_a_probe_whose_client_leaves_is_followed_by_another() -> None:
    chosen = router("a", "b")
    lose(chosen, "a")
    chosen.withdrawn(chosen.choose(prompt("?"), {"a": 0, "b": 0}, PAUSE_S))
    assert chosen.choose(prompt("?"), {"a": 0, "b": 0}, PAUSE_S).endpoint == "a"


def test_where_all_are_ejected_all_are_used() -> None:
    chosen = router("a", "b")
    lose(chosen, "a")
    lose(chosen, "b")
    assert chosen.choose(prompt("?"), {"a": 1, "b": 0}, 0.1).endpoint == "b"
    assert chosen.choose(prompt("?"), {"a": 1}, 0.1).endpoint == "a"
    assert chosen.choose(prompt("?"), {}, 0.1) is None


class Routing(RuleBasedStateMachine):
    """Requests come, succeed, fail, are lost and leave; endpoints can answer or not; time goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.router = router()
        self.now = 0.0
        self.able = dict.fromkeys(IDLE, True)
        self.running: list[Route] = []

    def loads(self) -> dict[str, int]:
        counts = {name: sum(route.endpoint == name for route in self.running) for name in IDLE}
        return {name: count for name, count in counts.items() if self.able[name]}

    @rule(text=st.sampled_from(["", "x" * 100, "x" * 300, "y" * 300]))
    def ask(self, text: str) -> None:
        loads = self.loads()
        ejected = {name for name in loads if self.router.ejected(name)}
        probed = {name for name in ejected if self.router._standings[name].probe}
        due = {name for name in ejected - probed if self.router._standings[name].until <= self.now}
        route = self.router.choose(prompt(text), loads, self.now)
        assert (route is None) == (not loads)
        if route is None:
            return
        assert route.endpoint in loads
        if due:
            assert route.endpoint in due
        elif ejected < set(loads):
            assert route.endpoint not in ejected
            least = min(load for name, load in loads.items() if name not in ejected)
            assert loads[route.endpoint] <= SLACK + FACTOR * least
        self.running.append(route)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), end=st.sampled_from(["succeeded", "failed", "lost", "withdrawn"]))
    def end(self, which: int, end: str) -> None:
        route = self.running.pop(which % len(self.running))
        probing = self.router._standings[route.endpoint].probe is route
        if end in ("failed", "lost"):
            getattr(self.router, end)(route, self.now)
        else:
            getattr(self.router, end)(route)
        if end == "lost" or (probing and end == "failed"):
            assert self.router.ejected(route.endpoint)
        if probing and end == "succeeded":
            assert not self.router.ejected(route.endpoint)

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=st.sampled_from(sorted(IDLE)))
    def turn(self, name: str) -> None:
        self.able[name] = not self.able[name]

    @invariant()
    def no_pause_is_longer_than_it_may_be(self) -> None:
        for standing in self.router._standings.values():
            assert standing.until is None or standing.until <= self.now + MAX_PAUSE_S
            assert standing.probe is None or standing.until is not None
            assert standing.probe is None or any(standing.probe is route for route in self.running)


TestRouting = Routing.TestCase
TestRouting.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
