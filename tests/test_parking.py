"""Parked and woken: memory given back, the same answers after it, and nobody served meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from pipelines import contracts, footprint, operations
from pipelines.engine import Limits, Request, parking
from pipelines.engine.batched import BatchedEngine
from pipelines.engine.echo import EchoEngine
from pipelines.engine.parking import LEAST, InHost, Parking
from pipelines.engine.tensors import tensors_of
from pipelines.engine.weights import load
from pipelines.errors import StageError
from pipelines.generate import Generate
from pipelines.phases import NAMES, Phases
from pipelines.pipeline import get_pipeline
from pipelines.sampling import Sampling
from tests.driving import answer, engine, greedy
from tests.models import COMPATIBLE, FAST, prompt
from tests.product import Product, wait_for
from tests.test_generate import LIMITS, collect, never, polled

CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
SOME = 1 << 20


@pytest.fixture(scope="module")
def smollm2(smollm2_home: Path) -> BatchedEngine:
    model, limits = load(smollm2_home)
    return BatchedEngine(model, limits)


def test_the_real_model_answers_with_the_same_bits_and_its_memory_was_gone(smollm2: BatchedEngine) -> None:
    """Log probabilities are compared: two steps whose logits differ in a bit differ there."""
    ids = prompt(40)
    asked = greedy(12, logprobs=True, top_logprobs=5)

    def answered(name: str) -> tuple[list[int], list[Any]]:
        smollm2.submit(Request(name, ids, asked))
        outputs = []
        while smollm2.busy:
            outputs += smollm2.step()
        return [id for output in outputs for id in output.token_ids], [output.logprobs for output in outputs]

    before = answered("before")
    cached = smollm2.counters.cached_tokens
    footprint.trim()
    weights = sum(tensor.nbytes for tensor in tensors_of(smollm2._forward._model).values() if tensor.nbytes >= LEAST)
    assert weights > 80e6
    held = footprint.ram_bytes()
    smollm2.park()
    assert held - footprint.ram_bytes() > 0.98 * weights
    smollm2.wake()
    assert held - footprint.ram_bytes() < 0.1 * weights
    assert answered("after") == before
    assert smollm2.counters.cached_tokens == cached, "what was computed before is not there any more"


@pytest.mark.parametrize("name", [*FAST, *COMPATIBLE])
def test_every_kind_of_model_comes_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "LEAST", 1)  # these are tiny, and some pages of theirs whole
    driven = engine(name)
    wanted = answer(driven, prompt(30), greedy(10))
    for _ in range(2):
        driven.park()
        driven.wake()
        assert answer(driven, prompt(30), greedy(10)) == wanted


def test_what_is_parked_is_not_in_memory_and_comes_back_whole(tmp_path: Path) -> None:
    tensors = [torch.randn(SOME + 3), torch.arange(SOME, dtype=torch.int16), torch.randn(5)]
    tensors.append(tensors[0][100:])  # of the same memory
    copies, places = [tensor.clone() for tensor in tensors], [tensor.data_ptr() for tensor in tensors]
    parked = Parking(tensors, tmp_path)
    for _ in range(2):
        parked.park()
        assert not tensors[0][2000:-2000].any()
        assert torch.equal(tensors[2], copies[2]), "too small to be worth it"
        parked.wake()
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))
        assert [tensor.data_ptr() for tensor in tensors] == places
    assert list(tmp_path.iterdir()) == [], "the file has no name: it goes with the process"


def test_without_room_on_the_disk_all_stays(tmp_path: Path) -> None:
    tensor = torch.randn(SOME)
    copy = tensor.clone()
    (tmp_path / "file").touch()
    parked = Parking([tensor], tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        parked.park()
    assert torch.equal(tensor, copy)


def test_in_the_host_a_storage_is_empty_until_it_wakes() -> None:
    """What is done with a GPU's, on a storage of the host's own."""
    tensor = torch.randn(5 * SOME)
    copy, parked = tensor.clone(), InHost(tensor.untyped_storage())
    for _ in range(2):
        parked.park()
        assert tensor.untyped_storage().nbytes() == 0
        parked.wake()
        parked.wake()
        assert torch.equal(tensor, copy)


@pytest.fixture
def stage() -> Iterator[Generate]:
    stage = Generate(EchoEngine(LIMITS, tokens_per_s=100), stop_checker=never, phases_s={"spawn": 1.5})
    yield stage
    stage.close()


class Asked:
    """A request that is an operation alone."""

    id, traceparent = "", None

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.parameters: dict[str, Any] = {}


def told(stage: Generate, operation: str) -> Any:
    """What an operation answers."""
    answers: list[Any] = []
    operations.operate(stage, Asked(operation), answers.append)  # type: ignore[arg-type]
    wait_for(lambda: answers, 30)
    return answers[0] if isinstance(answers[0], StageError) else orjson.loads(answers[0][contracts.ROWS])


def test_parked_it_takes_no_request_and_answers_polls(stage: Generate) -> None:
    state = told(stage, "state")
    assert state["state"] == "ready"
    assert state["can_park"]
    assert state["phases_s"] == {"spawn": 1.5}
    assert state["ram_bytes"] > 1e6
    assert state["gpu_bytes"] == 0
    assert state["parked_ram_bytes"] is None
    for _ in range(2):
        assert told(stage, "park")["parked"] is True
        state = told(stage, "state")
        assert state["state"] == "parked"
        assert state["parked_ram_bytes"] > 1e6
        for ask in (
            lambda: stage.submit("a", [1], Sampling(max_tokens=1)),
            lambda: stage.generate([1], Sampling(max_tokens=1), lambda _: None),
        ):
            with pytest.raises(StageError, match="is parked") as refused:
                ask()
            assert refused.value.code == "unavailable"
        assert polled(stage, wait_s=0.01).rows == []
    for _ in range(2):
        woken = told(stage, "wake")
        assert woken["woken"] is True
        assert woken["wake_s"] >= 0
    assert told(stage, "state")["state"] == "ready"
    stage.submit("a", [1, 2], Sampling(max_tokens=3))
    assert collect(stage, "a") == {"a": [[1, 2, 1], "length"]}


def test_it_is_not_parked_while_a_request_runs(stage: Generate) -> None:
    stage.submit("a", [1], Sampling(max_tokens=20))
    with pytest.raises(StageError, match="1 requests run") as refused:
        told(stage, "park")
    assert refused.value.code == "unavailable"
    assert told(stage, "state")["state"] == "ready"
    assert collect(stage, "a")["a"][1] == "length"
    assert told(stage, "park")["parked"] is True


class Slow(EchoEngine):
    """Parks when it is told, and can fail at it."""

    def __init__(self) -> None:
        super().__init__(Limits(100, frozenset()))
        self.go_on, self.fails, self.done = threading.Event(), "", []

    def park(self) -> None:
        self._do("park")

    def wake(self) -> None:
        self._do("wake")

    def _do(self, verb: str) -> None:
        assert self.go_on.wait(30)
        if verb == self.fails:
            raise OSError(28, "No space left on device")
        self.done.append(verb)


def test_on_its_way_it_takes_no_request_either() -> None:
    """Parked, woken and parked again, all asked for at once: never is a request on an engine without weights."""
    slow = Slow()
    stage = Generate(slow, stop_checker=never)
    done: list[Any] = []
    stage.park(done.append)
    stage.wake(done.append)
    stage.park(done.append)
    with pytest.raises(StageError, match="is parked"):
        stage.submit("a", [1], Sampling(max_tokens=1))
    assert polled(stage, wait_s=0.01).rows == [], "polls are answered meanwhile"
    slow.go_on.set()
    wait_for(lambda: len(done) == 3, 30)
    assert slow.done == ["park", "wake", "park"]
    assert stage.state().state == "parked"
    stage.close()


@pytest.mark.parametrize(("fails", "state"), [("park", "ready"), ("wake", "parked")])
def test_where_it_fails_it_is_as_before_and_says_why(fails: str, state: str) -> None:
    slow = Slow()
    slow.go_on.set()
    slow.fails = fails
    stage = Generate(slow, stop_checker=never)
    if fails == "wake":
        told(stage, "park")
    error = told(stage, fails)
    assert "No space left" in error.message
    assert error.code == "unavailable"
    assert told(stage, "state")["state"] == state
    slow.fails = ""
    assert told(stage, "wake")["woken"] is True
    stage.submit("a", [1], Sampling(max_tokens=1))
    assert collect(stage, "a")["a"][1] == "length"
    stage.close()


def test_who_waits_for_it_is_told_when_it_ends() -> None:
    slow, done = Slow(), []
    stage = Generate(slow, stop_checker=never)
    stage.park(done.append)
    wait_for(lambda: not stage._commands, 10)
    stage.wake(done.append)
    closing = threading.Thread(target=stage.close)
    closing.start()
    wait_for(lambda: done, 10)
    assert "stopped" in done[0].message
    slow.go_on.set()
    closing.join(10)
    assert len(done) == 2, "each is answered once"


def test_an_engine_that_cannot_says_so() -> None:
    class Stubborn(EchoEngine):
        can_park = False

    stage = Generate(Stubborn(LIMITS), stop_checker=never)
    assert told(stage, "state")["can_park"] is False
    with pytest.raises(StageError, match="cannot be parked"):
        told(stage, "park")
    stage.close()


def test_a_load_says_how_long_its_parts_took(smollm2_home: Path) -> None:
    phases = Phases()
    stage = operations.load(get_pipeline("smollm2-135m-instruct"), phases)
    found = stage.state().phases_s
    assert tuple(found) == NAMES
    assert all(seconds > 0 for seconds in found.values())
    stage.close()


def test_parked_in_the_product_and_woken(product: Product) -> None:
    """Through the real Triton: memory goes, a request is refused, and after waking the answer is the same."""
    wanted = product.infer("ensemble", {"prompt": "Name a colour.", "sampling": '{"temperature": 0, "max_tokens": 8}'})
    ready = product.operate("generate", "state")
    assert ready["state"] == "ready"
    assert all(ready["phases_s"][name] > 0 for name in NAMES)
    try:
        assert product.operate("generate", "park")["parked"] is True
        parked = product.operate("generate", "state")
        assert parked["state"] == "parked"
        assert ready["ram_bytes"] - parked["ram_bytes"] > 80e6
        with pytest.raises(Exception, match="is parked"):
            product.infer("ensemble", {"prompt": "Name a colour."})
    finally:
        assert product.operate("generate", "wake")["woken"] is True
    again = product.infer("ensemble", {"prompt": "Name a colour.", "sampling": '{"temperature": 0, "max_tokens": 8}'})
    assert again == wanted
