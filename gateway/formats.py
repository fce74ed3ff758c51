"""Which format the answers of each pipeline have: read from its files when it is first asked for."""

from __future__ import annotations

import logging

from pipelines.answer.formats import AnswerFormat
from pipelines.pipeline import Pipeline

log = logging.getLogger(__name__)


class Formats:
    def __init__(self) -> None:
        self._found: dict[str, tuple[str, AnswerFormat]] = {}  # by name, of which version

    def of(self, pipeline: Pipeline) -> AnswerFormat:
        version, form = self._found.get(pipeline.name, ("", None))
        if form is None or version != pipeline.version:
            form = _load(pipeline)
            self._found[pipeline.name] = pipeline.version, form
        return form


def _load(pipeline: Pipeline) -> AnswerFormat:
    try:
        return AnswerFormat.load(pipeline.home, pipeline.chat_template)
    except (OSError, ValueError) as error:  # its preprocess does not load either, and says so
        log.warning("the answers of %s are taken for plain text: %s", pipeline.name, error)
        return AnswerFormat()
