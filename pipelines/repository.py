"""Renders a pipeline's five models into a model repository. The checked-in one is this for the default pipeline.

python -m pipelines.repository        writes model_repository/*/config.pbtxt anew from contracts.py
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from pipelines.contracts import MODELS, config_pbtxt, model_name, models_of
from pipelines.pipeline import DEFAULT, Pipeline, get_pipeline

CHECKED_IN = Path(__file__).parent.parent / "model_repository"


def prepare(pipelines: Sequence[Pipeline], folder: Path) -> list[Path]:
    """The repositories that serve these: the checked-in one, and `folder` with the others rendered and nothing else."""
    rendered = [pipeline for pipeline in pipelines if pipeline.name != DEFAULT]
    keep = {model_name(pipeline.name, model) for pipeline in rendered for model in MODELS}
    for model in folder.iterdir() if folder.exists() else ():
        if model.name not in keep:
            shutil.rmtree(model)
    for pipeline in rendered:
        render(pipeline, folder)
    return ([CHECKED_IN] if len(rendered) < len(pipelines) else []) + ([folder] if rendered else [])


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
