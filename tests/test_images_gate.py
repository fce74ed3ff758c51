"""Memory that many share: order, sums, and that nothing is lost, however a holder ends."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import StageError
from pipelines.images.gate import Gate

LONG = 30  # seconds that catch a hang, and nothing else


def until(true) -> None:
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end, "waited for nothing"
        time.sleep(0.001)


class Holder(threading.Thread):
    """Holds from when it gets its turn until it is told to stop."""

    def __init__(self, gate: Gate, amount: int, order: list[int]) -> None:
        super().__init__(daemon=True)
        self.gate, self.amount, self.order = gate, amount, order
        self.inside, self.stop = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with self.gate.of(self.amount, LONG):
            self.order.append(self.amount)
            self.inside.set()
            self.stop.wait(LONG)

    def end(self) -> None:
        self.stop.set()
        self.join(LONG)


def test_who_fits_goes_in_at_once():
    gate = Gate(10)
    with gate.of(4, 0), gate.of(6, 0), gate.of(0, 0):
        assert (gate.held, gate.waiting) == (10, 0)
    assert gate.held == 0


def test_a_small_one_does_not_pass_a_large_one():
    gate, order = Gate(10), []
    first = Holder(gate, 5, order)
    assert first.inside.wait(LONG)
    large = Holder(gate, 9, order)
    until(lambda: gate.waiting == 1)
    small = Holder(gate, 1, order)
    until(lambda: gate.waiting == 2)
    assert not small.inside.wait(0.05)
    first.end()
    assert large.inside.wait(LONG)
    assert small.inside.wait(LONG)
    assert order[0] == 5
    assert gate.held == 10
    large.end()
    small.end()
    assert gate.held == 0


def test_more_than_all_has_its_turn_when_all_is_free():
    gate, order = Gate(10), []
    first = Holder(gate, 1, order)
    assert first.inside.wait(LONG)
    giant = Holder(gate, 1000, order)
    until(lambda: gate.waiting == 1)
    assert not giant.inside.is_set()
    first.end()
    assert giant.inside.wait(LONG)
    assert gate.held == 10
    giant.end()
    assert gate.held == 0


def test_who_gives_up_blocks_nobody():
    gate, order = Gate(10), []
    first = Holder(gate, 5, order)
    assert first.inside.wait(LONG)
    gave_up = []

    def impatient() -> None:
        try:
            with gate.of(10, 0.2):
                pass
        except StageError as error:
            gave_up.append(error.code)

    thread = threading.Thread(target=impatient)
    thread.start()
    until(lambda: gate.waiting == 1)
    small = Holder(gate, 5, order)
    assert small.inside.wait(LONG)  # while the first still holds
    thread.join(LONG)
    assert gave_up == ["timeout"]
    first.end()
    small.end()
    assert (gate.held, gate.waiting) == (0, 0)


def test_an_exception_gives_back():
    gate = Gate(10)
    with pytest.raises(KeyError):
        with gate.of(10):
            raise KeyError
    with gate.of(10, 0):
        assert gate.held == 10


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="capacity"):
        Gate(0)
    with pytest.raises(ValueError, match="-1 bytes"):
        with Gate(1).of(-1):
            pass
    gate = Gate(1)
    assert (gate.held, gate.waiting) == (0, 0)


class Counter:
    """What is inside, counted by those who are."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = 0

    def add(self, amount: int) -> None:
        with self.lock:
            self.now += amount
            self.most = max(self.most, self.now)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["leave", "raise", "give up"])), min_size=1, max_size=16),
)
def test_never_more_than_all_and_nothing_lost(capacity, asked):
    gate, inside = Gate(capacity), Counter()
    ends: list[str] = []

    def work(amount: int, how: str) -> None:
        held = min(amount, capacity)
        try:
            with gate.of(amount, 0.0005 if how == "give up" else LONG):
                inside.add(held)
                time.sleep(0.0003)
                inside.add(-held)
                if how == "raise":
                    raise KeyError
        except (KeyError, StageError) as error:
            ends.append(type(error).__name__)
        else:
            ends.append("left")

    threads = [threading.Thread(target=work, args=one, daemon=True) for one in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert len(ends) == len(asked)
    assert ends.count("KeyError") == sum(how == "raise" for _, how in asked)
    assert inside.most <= capacity
    assert (gate.held, gate.waiting, inside.now) == (0, 0, 0)
