"""Renders a pipeline's five models into a model repository. The checked-in one is this for the default pipeline.

python -m pipelines.repository        writes model_repository/*/config.pbtxt anew from contracts.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pipelines.contracts import config_pbtxt, model_name, models_of
from pipelines.pipeline import DEFAULT, Pipeline, get_pipeline

CHECKED_IN = Path(__file__).parent.parent / "model_repository"


def emptied(folder: Path) -> Path:
    """The folder, with nothing of an earlier server's in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def render(pipeline: Pipeline, into: Path) -> None:
    """Write the five models of a pipeline. Files whose text is the same are left alone: Triton compares mtimes."""
    for model, spec in models_of(pipeline).items():
        folder = into / model_name(pipeline.name, model)
        version = folder / "1"
        version.mkdir(parents=True, exist_ok=True)
        _write(folder / "config.pbtxt", config_pbtxt(pipeline, model))
        if not spec.steps and into != CHECKED_IN:
            _write(version / "model.py", (CHECKED_IN / model / "1" / "model.py").read_text(encoding="utf-8"))


def _write(file: Path, text: str) -> None:
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    render(get_pipeline(DEFAULT), CHECKED_IN)
