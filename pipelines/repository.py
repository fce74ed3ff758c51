"""Renders a pipeline's five models into a model repository. The checked-in one is this for the default pipeline.

python -m pipelines.repository        writes model_repository/*/config.pbtxt anew from contracts.py
"""

from __future__ import annotations

from pathlib import Path

from pipelines.contracts import MODELS, config_pbtxt, model_name
from pipelines.pipeline import DEFAULT, cache_dir

CHECKED_IN = Path(__file__).parent.parent / "model_repository"


def repository_of(pipeline: str) -> Path:
    """Where a pipeline's models are: the checked-in repository, or a rendered one."""
    return CHECKED_IN if pipeline == DEFAULT else cache_dir() / "model_repository"


def render(pipeline: str, into: Path) -> None:
    """Write the five models of a pipeline. Files whose text is the same are left alone: Triton compares mtimes."""
    for model, spec in MODELS.items():
        folder = into / model_name(pipeline, model)
        version = folder / "1"
        version.mkdir(parents=True, exist_ok=True)
        _write(folder / "config.pbtxt", config_pbtxt(pipeline, model))
        if not spec.steps and into != CHECKED_IN:
            _write(version / "model.py", (CHECKED_IN / model / "1" / "model.py").read_text(encoding="utf-8"))


def _write(file: Path, text: str) -> None:
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    render(DEFAULT, CHECKED_IN)
