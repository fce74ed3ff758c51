"""The checked-in model repository is what contracts.py says, and its models stay thin."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.contracts import ENSEMBLE, MODELS, config_pbtxt, model_name, models_of
from pipelines.pipeline import DEFAULT, Pipeline, get_pipeline
from pipelines.repository import CHECKED_IN, render

SCRIPTED = [model for model in MODELS if model != ENSEMBLE]


def pipeline(name: str, **keys: int) -> Pipeline:
    return Pipeline(name=name, source="path:/nowhere", **keys)


@pytest.mark.parametrize("model", MODELS)
def test_checked_in_config_is_the_contract(model: str) -> None:
    assert (CHECKED_IN / model / "config.pbtxt").read_text() == config_pbtxt(get_pipeline(DEFAULT), model)


@pytest.mark.parametrize("model", SCRIPTED)
def test_models_are_thin(model: str) -> None:
    lines = (CHECKED_IN / model / "1" / "model.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 32


def test_other_pipelines_are_rendered_from_the_same_models(tmp_path: Path) -> None:
    render(pipeline("other"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"other-{model}" for model in MODELS)
    assert model_name("other", "ensemble") == "other-ensemble"
    ensemble = (tmp_path / "other-ensemble" / "config.pbtxt").read_text()
    assert 'model_name: "other-generate"' in ensemble
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    render(pipeline("other"), tmp_path)  # Triton reloads what has a newer mtime
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("model", SCRIPTED)
def test_the_rendered_model_is_the_checked_in_one(model: str, tmp_path: Path) -> None:
    render(pipeline("other"), tmp_path)
    rendered = (tmp_path / f"other-{model}" / "1" / "model.py").read_text()
    assert rendered == (CHECKED_IN / model / "1" / "model.py").read_text()


def test_a_pipeline_that_reads_text_pays_nothing_for_pictures() -> None:
    for model in MODELS:
        text = config_pbtxt(pipeline("other"), model)
        assert "features" not in text
        assert "pictures" not in text
        assert ('name: "image"' in text) == (model in ("preprocess", "ensemble", "orchestrator"))  # to be refused


def test_features_go_from_preprocess_to_generate_and_no_further() -> None:
    seeing = pipeline("seeing", max_images=2)
    assert 'output { name: "features" data_type: TYPE_UINT8 dims: [ -1 ] }' in config_pbtxt(seeing, "preprocess")
    assert 'output { name: "pictures" data_type: TYPE_STRING dims: [ 1 ] }' in config_pbtxt(seeing, "preprocess")
    assert 'input { name: "features" data_type: TYPE_UINT8 dims: [ -1 ] optional: true }' in config_pbtxt(
        seeing, "generate"
    )
    before, generate, after = models_of(seeing)[ENSEMBLE].steps
    assert before[2]["features"] == generate[1]["features"]
    assert "features" not in after[1]
    for model in ("postprocess", "orchestrator"):
        assert config_pbtxt(seeing, model) == config_pbtxt(pipeline("seeing"), model)


def test_preprocess_alone_may_have_several_instances() -> None:
    wide = pipeline("wide", preprocess_instances=3)
    assert [model for model in SCRIPTED if "count: 3" in config_pbtxt(wide, model)] == ["preprocess"]
    assert all("count: 1" in config_pbtxt(wide, model) for model in SCRIPTED if model != "preprocess")
