"""Log lines: JSON for machines, one plain line for a terminal. Knows no request: ids come in through `extra`, or for
all that is logged from here on in a context, through `about`.

Only the fields named here are taken from `extra`, so that a prompt cannot reach a log by accident.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime, timezone
from types import MappingProxyType
from typing import TextIO

import orjson

FIELDS = (
    "source",
    "trace_id",
    "span_id",
    "request_id",
    "pipeline",
    "stage",
    "operation",
    "status",
    "reason",
    "error_type",
    "duration_ms",
    "prompt_tokens",
    "output_tokens",
    "retries",
)

LEVELS = ("debug", "info", "warning", "error", "critical")
FORMATS = ("auto", "json", "text")
_OURS = ("gateway", "observability", "pipelines")
_NOTHING: Mapping[str, str | None] = MappingProxyType({})
_about: ContextVar[Mapping[str, str | None]] = ContextVar("about", default=_NOTHING)


def about(**ids: str | None) -> None:
    """Fields of everything that is logged from here on in this task, and in those that it starts."""
    _about.set(ids)


class JsonFormatter(logging.Formatter):
    """One JSON object a line; times are UTC, RFC 3339. Every line has the fields `always`, unless it has its own."""

    def __init__(self, always: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._always = always or {}

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._always,
            **_fields(record),
        }
        if trace := getattr(record, "traceback", None):
            line["traceback"] = trace
        if record.exc_info and record.exc_info[0]:
            line["error_type"] = record.exc_info[0].__name__
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # what is no UTF-8, as half of a surrogate pair, is told too
            return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """`12:30:59 warning gateway.lanes: message  request_id=…`"""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        fields = "".join(f"  {name}={value}" for name, value in _fields(record).items())
        line = f"{time} {record.levelname.lower()} {record.name}: {record.getMessage()}{fields}"
        if trace := getattr(record, "traceback", None):
            return f"{line}\n{trace}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(level: str = "info", fmt: str = "auto", stream: TextIO | None = None, **always: str) -> None:
    """Sends records at `level` and above to stderr, others' than our own from `warning` on.

    "auto" is text on a terminal, else JSON. `always` are fields of every JSON line.
    """
    stream = stream or sys.stderr
    if level not in LEVELS:
        raise ValueError(f"log level {level!r} must be debug, info, warning, error or critical")
    if fmt not in FORMATS:
        raise ValueError(f"log format {fmt!r} must be auto, json or text")
    # No line has a thread, a process or a place in the source: to look for them is a quarter of what a line takes
    # (Python's logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    numeric = logging.getLevelName(level.upper())
    text = stream.isatty() if fmt == "auto" else fmt == "text"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if text else JsonFormatter(always))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(numeric if numeric < logging.INFO else max(numeric, logging.WARNING))
    for name in _OURS:
        logging.getLogger(name).setLevel(numeric)


def configure_stage(stage: str, pipeline: str) -> None:
    """In a stage's process: JSON, whatever reads it (`observability.triton_log`), at the gateway's level."""
    configure(os.environ.get("TRIPTYCH_LOG_LEVEL") or "info", "json", source=stage, pipeline=pipeline)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    given = {name: getattr(record, name, None) for name in FIELDS}
    return {name: value for name, value in {**_about.get(), **_set(given)}.items() if value is not None}


def _set(fields: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}
