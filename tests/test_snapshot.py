"""A model kept as one file: the same bits when it is read again, and a load as before where it cannot be read."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelines import operations
from pipelines.engine import Limits, Request, snapshot
from pipelines.engine.batched import BatchedEngine
from pipelines.engine.snapshot import Reading, SnapshotError, write
from pipelines.engine.weights import load
from pipelines.phases import Phases
from pipelines.pipeline import get_pipeline
from tests.driving import greedy
from tests.models import FAST, build, prompt


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of its own, with the weights and kernels that are there."""
    from pipelines.pipeline import cache_dir

    for made in ("weights", "kernels", "compiled"):
        (cache_dir() / made).mkdir(parents=True, exist_ok=True)
        (tmp_path / made).symlink_to(cache_dir() / made)
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    return tmp_path


def told(model: Any, *, limits: Limits | None = None) -> list[Any]:
    """Greedy tokens, and the log probabilities that they had."""
    engine = BatchedEngine(model, limits or Limits(600, frozenset()))
    engine.submit(Request("a", prompt(40), greedy(6, logprobs=True, top_logprobs=3)))
    found = []
    while engine.busy:
        found += [(output.token_ids, output.logprobs) for output in engine.step()]
    return found


def test_the_real_model_answers_with_the_same_bits(smollm2_home: Path, tmp_path: Path) -> None:
    model, limits = load(smollm2_home)
    write(tmp_path / "home-1", model)
    wanted = told(model, limits=limits)
    assert told(Reading(tmp_path / "home-1").model().eval(), limits=limits) == wanted


@pytest.mark.parametrize("name", FAST)
def test_every_model_comes_back(name: str, tmp_path: Path) -> None:
    model = build(name)
    write(tmp_path / "home-1", model)
    assert told(Reading(tmp_path / "home-1").model()) == told(model)


class Held(nn.Module):
    """Tensors in all the ways that models hold them."""

    config = Limits(1, frozenset())

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 7))
        self.tied = self.weight
        self.register_buffer("buffer", torch.arange(9, dtype=torch.int16))
        self.view = self.weight.detach()[1:, ::2]
        self.half = [torch.randn(3).bfloat16(), torch.empty(0)]


def test_what_is_shared_stays_shared(tmp_path: Path) -> None:
    held = Held()
    write(tmp_path / "home-1", held)
    found = Reading(tmp_path / "home-1").model()
    assert isinstance(found.weight, nn.Parameter)
    assert found.tied is found.weight
    for name in ("weight", "buffer", "view"):
        assert torch.equal(getattr(found, name), getattr(held, name))
    assert found.view.data_ptr() == found.weight.data_ptr() + 7 * 4
    assert found.view.stride() == held.view.stride()
    assert torch.equal(found.half[0], held.half[0])
    assert found.weight.data_ptr() % 64 == 0


def test_it_takes_the_place_of_what_was_there_for_the_same_home(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    for name in ("home-1", "other-1", "home-2", "home-2"):
        write(folder / name, Held())
    assert sorted(file.name for file in folder.iterdir()) == ["home-2", "other-1"]


def test_a_model_that_cannot_be_kept_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = Held()
    held.hook = lambda: None
    write(tmp_path / "snapshots" / "home-1", held)
    assert "no snapshot" in caplog.text
    assert not (tmp_path / "snapshots" / "home-1").exists()


@pytest.mark.parametrize("harm", ["empty", "text", "cut", "pickle"])
def test_a_broken_file_is_an_error(harm: str, tmp_path: Path) -> None:
    path = tmp_path / "home-1"
    write(path, Held())
    content = bytearray(path.read_bytes())
    if harm == "pickle":
        at = content.index(b"Held")
        content[at : at + 4] = b"Hold"
    path.write_bytes({"empty": b"", "text": b"no such thing" * 9, "cut": content[:-1], "pickle": content}[harm])
    with pytest.raises(SnapshotError):
        Reading(path).model()


def test_there_is_a_place_for_each_way_to_load_a_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "a.gguf").write_bytes(b"1")

    def places() -> set[Path]:
        ways = [("auto", ""), ("float32", ""), ("auto", "int8")]
        return {snapshot.place(home, *way) for way in ways} | {snapshot.place(home, "auto", "", pictures=True)}

    before = places()
    assert len(before) == 4
    assert places() == before
    os.utime(home / "a.gguf", (1, 1))
    assert not before & places()


@pytest.mark.parametrize("harm", [False, True])
def test_a_pipeline_is_converted_once(
    harm: bool, cache: Path, smollm2_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second load reads what the first kept; where that is broken it converts again."""
    converted = []
    monkeypatch.setattr(operations, "_converted", lambda *asked: converted.append(asked) or _original(*asked))
    pipeline = replace(get_pipeline("smollm2-135m-instruct"), kv_cache_mb=64)
    for _ in range(2):
        engine = operations.load_engine(pipeline, Phases())
        engine._forward._compiled.close()  # type: ignore[attr-defined]
        (kept,) = (cache / "snapshots").iterdir()
        if harm:
            os.truncate(kept, 1000)
    assert len(converted) == 1 + harm


_original = operations._converted
