"""Which format the answers of each pipeline have: read from its files once, when the gateway starts."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from pipelines.answer.formats import AnswerFormat
from pipelines.pipeline import Pipeline

log = logging.getLogger(__name__)


class Formats:
    def __init__(self, pipelines: Iterable[Pipeline]) -> None:
        self._found: dict[Path, AnswerFormat] = {}
        for pipeline in pipelines:
            self.of(pipeline)

    def of(self, pipeline: Pipeline) -> AnswerFormat:
        home = pipeline.home
        if home not in self._found:
            self._found[home] = _load(pipeline)
        return self._found[home]


def _load(pipeline: Pipeline) -> AnswerFormat:
    try:
        return AnswerFormat.load(pipeline.home)
    except (OSError, ValueError) as error:  # its preprocess does not load either, and says so
        log.warning("the answers of %s are taken for plain text: %s", pipeline.name, error)
        return AnswerFormat()
