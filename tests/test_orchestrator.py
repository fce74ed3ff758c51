"""The orchestrator's own rules, its stages scripted; what it does with real ones is in test_stack."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from pipelines import contracts, wire
from pipelines.errors import StageError
from pipelines.generate import Poll
from pipelines.orchestrator import Orchestrator
from pipelines.pipeline import Pipeline
from tests.product import wait_for


class Asked:
    """A request that is an operation, without inputs."""

    id, traceparent = "", None

    def __init__(self, operation: str, **parameters: Any) -> None:
        self.operation, self.parameters = operation, parameters

    def text(self, tensor: contracts.Tensor) -> None: ...

    def encoded(self, tensor: contracts.Tensor) -> None: ...

    def ids(self, tensor: contracts.Tensor) -> list[int]:
        return []

    def data(self, tensor: contracts.Tensor) -> None: ...


class Heard:
    def __init__(self) -> None:
        self.ended = threading.Event()

    def send(self, values: contracts.Values, *, final: bool = False) -> None: ...

    def fail(self, error: StageError) -> None: ...

    def end(self) -> None:
        self.ended.set()

    def gone(self) -> bool:
        return False


def test_one_that_was_told_to_be_quiet_calls_no_stage() -> None:
    """Killed while it makes a call it leaves a lock locked, and tritonserver aborts."""
    calls: list[str] = []

    def call(stage: str, values: object, outputs: object, parameters: object) -> dict[contracts.Tensor, Any]:
        calls.append(stage)
        time.sleep(0.01)
        ids, rows = wire.pack_poll(Poll([], {}))
        return {contracts.OUTPUT_IDS: ids, contracts.ROWS: rows}

    tested = Orchestrator(Pipeline(name="m", source="path:none"), call)
    tested.take(Asked("lane", listener="gateway"), Heard())
    wait_for(lambda: len(calls) > 3, 20)
    quieted = Heard()
    tested.take(Asked("quiesce"), quieted)
    assert quieted.ended.is_set()
    time.sleep(0.1)
    seen = len(calls)
    tested.take(Asked("submit", listener="gateway"), Heard())
    tested.take(Asked("cancel", listener="gateway", id="r"), Heard())
    time.sleep(0.3)
    assert len(calls) == seen
    tested.close()


def test_what_it_does_not_know_is_said() -> None:
    tested = Orchestrator(Pipeline(name="m", source="path:none"), lambda *_: {})
    with pytest.raises(StageError, match="unknown operation 'dance'"):
        tested.take(Asked("dance"), Heard())
    tested.close()
