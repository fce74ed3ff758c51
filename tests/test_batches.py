"""What is put in comes out once, in batches, whoever puts it in and whatever becomes of who takes it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from observability.batches import Batches
from tests.product import wait_for


class Taken:
    """What was taken, and a gate before it."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()

    def __call__(self, batch: list[int]) -> None:
        self.open.wait(10)
        self.batches.append(list(batch))

    @property
    def all(self) -> list[int]:
        return [item for batch in self.batches for item in batch]


@pytest.fixture
def taken() -> Taken:
    return Taken()


@pytest.fixture
def made(taken: Taken) -> Iterator[Any]:
    every: list[Batches[int]] = []

    def make(**options: Any) -> Batches[int]:
        every.append(Batches("test", taken, **{"gather_s": 0.01, "most": 10, "most_waiting": 1000, **options}))
        return every[-1]

    yield make
    taken.open.set()
    for batches in every:
        batches.close(10)


def test_what_comes_together_is_one_batch_and_none_is_larger_than_the_most(made, taken):
    batches = made(gather_s=0.2)
    for number in range(25):
        batches.put(number)
    wait_for(lambda: len(taken.all) == 25, 5)
    assert taken.all == list(range(25))
    assert max(map(len, taken.batches)) == 10


def test_a_full_batch_does_not_wait_for_more(made, taken):
    batches = made(gather_s=60)
    for number in range(10):
        batches.put(number)
    wait_for(lambda: taken.batches == [list(range(10))], 5)


def test_from_many_threads_each_comes_once(made, taken):
    batches = made(gather_s=0.0001, most=3, most_waiting=100_000)

    def put(first: int) -> None:
        for number in range(first, first + 2000):
            batches.put(number)

    threads = [threading.Thread(target=put, args=(2000 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: len(taken.all) == 16_000, 20)  # without a flush: nobody was left to wait for the next
    assert sorted(taken.all) == list(range(16_000))
    assert batches.dropped == 0


def test_one_at_a_time_is_never_left_waiting(made, taken):
    batches = made(gather_s=0)
    for number in range(2000):
        batches.put(number)
        wait_for(lambda number=number: taken.all[-1:] == [number], 5)


def test_too_many_are_dropped_and_counted(made, taken):
    taken.open.clear()
    batches = made(gather_s=0, most=1, most_waiting=5)
    batches.put(0)
    wait_for(lambda: batches._taking, 5)
    for number in range(1, 9):
        batches.put(number)
    taken.open.set()
    assert batches.flush(10)
    assert (taken.all, batches.dropped) == ([0, 1, 2, 3, 4, 5], 3)


def test_a_flush_is_over_when_all_was_taken_and_a_close_takes_what_waits(made, taken):
    batches = made(gather_s=60)
    assert batches.flush(10)  # of nothing
    for number in range(3):
        batches.put(number)
    assert batches.flush(10)
    assert taken.all == [0, 1, 2]
    batches.put(3)
    batches.close(10)
    assert taken.all == [0, 1, 2, 3]
    batches.put(4)
    assert batches.dropped == 1


def test_neither_waits_for_ever(made, taken):
    taken.open.clear()
    batches = made(gather_s=0)
    batches.put(1)
    assert not batches.flush(0.05)
    batches.close(0.05)
    assert taken.all == []


def test_a_take_that_fails_is_not_the_end(caplog):
    taken: list[list[int]] = []

    def take(batch: list[int]) -> None:
        taken.append(batch)
        raise RuntimeError("no")

    batches = Batches("test", take, gather_s=0, most=10, most_waiting=10)
    for number in range(2):
        batches.put(number)
        assert batches.flush(10)
    assert taken == [[0], [1]]
    assert [record.message for record in caplog.records] == ["test failed", "test failed"]
    batches.close(10)


def test_a_forked_child_has_nothing_of_its_parents(made, taken):
    batches = made(gather_s=60)
    batches.put(1)
    if (child := os.fork()) == 0:
        batches.put(2)
        assert batches.flush(10)
        os._exit(0 if taken.all == [2] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert batches.flush(10)
    assert taken.all == [1]
