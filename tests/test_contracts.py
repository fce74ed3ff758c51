"""The checked-in model repository is what contracts.py says, and its models stay thin."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.contracts import MODELS, config_pbtxt, model_name
from pipelines.pipeline import DEFAULT
from pipelines.repository import CHECKED_IN, prepare, render

SCRIPTED = [model for model, spec in MODELS.items() if not spec.steps]


@pytest.mark.parametrize("model", MODELS)
def test_checked_in_config_is_the_contract(model: str) -> None:
    assert (CHECKED_IN / model / "config.pbtxt").read_text() == config_pbtxt(DEFAULT, model)


@pytest.mark.parametrize("model", SCRIPTED)
def test_models_are_thin(model: str) -> None:
    lines = (CHECKED_IN / model / "1" / "model.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 32


def test_other_pipelines_are_rendered_from_the_same_models(tmp_path: Path) -> None:
    render("other", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"other-{model}" for model in MODELS)
    assert model_name("other", "ensemble") == "other-ensemble"
    ensemble = (tmp_path / "other-ensemble" / "config.pbtxt").read_text()
    assert 'model_name: "other-generate"' in ensemble
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    render("other", tmp_path)  # Triton reloads what has a newer mtime
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_repository_holds_what_is_served_and_nothing_else(tmp_path: Path) -> None:
    assert prepare([DEFAULT], tmp_path / "none") == [CHECKED_IN]
    assert prepare(["one", "two"], tmp_path) == [tmp_path]
    assert prepare([DEFAULT, "two"], tmp_path) == [CHECKED_IN, tmp_path]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"two-{model}" for model in MODELS)


@pytest.mark.parametrize("model", SCRIPTED)
def test_the_rendered_model_is_the_checked_in_one(model: str, tmp_path: Path) -> None:
    render("other", tmp_path)
    rendered = (tmp_path / f"other-{model}" / "1" / "model.py").read_text()
    assert rendered == (CHECKED_IN / model / "1" / "model.py").read_text()
