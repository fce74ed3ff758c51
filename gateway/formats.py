"""Which format the answers of each pipeline have: read from its files once, when the gateway starts."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from pipelines.answer.formats import AnswerFormat
from pipelines.pipeline import Pipeline

log = logging.getLogger(__name__)


class Formats:
    def __init__(self, pipelines: Iterable[Pipeline]) -> None:
        self._found: dict[str, AnswerFormat] = {}
        for pipeline in pipelines:
            self.of(pipeline)

    def of(self, pipeline: Pipeline) -> AnswerFormat:
        if pipeline.name not in self._found:
            self._found[pipeline.name] = _load(pipeline)
        return self._found[pipeline.name]


def _load(pipeline: Pipeline) -> AnswerFormat:
    try:
        return AnswerFormat.load(pipeline.home, pipeline.chat_template)
    except (OSError, ValueError) as error:  # its preprocess does not load either, and says so
        log.warning("the answers of %s are taken for plain text: %s", pipeline.name, error)
        return AnswerFormat()
