"""Log lines: JSON for machines, one plain line for a terminal. Knows no request: ids come in through `extra`.

Only the fields named here are taken from `extra`, so that a prompt cannot reach a log by accident.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Literal, TextIO

FIELDS = (
    "trace_id",
    "span_id",
    "request_id",
    "pipeline",
    "stage",
    "operation",
    "status",
    "reason",
    "duration_ms",
    "prompt_tokens",
    "output_tokens",
)

Format = Literal["auto", "json", "text"]


class JsonFormatter(logging.Formatter):
    """One JSON object a line; times are UTC, RFC 3339."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info and record.exc_info[0]:
            line["error_type"] = record.exc_info[0].__name__
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """`12:30:59 warning gateway.lanes: message  request_id=…`"""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        fields = "".join(f"  {name}={value}" for name, value in _fields(record).items())
        line = f"{time} {record.levelname.lower()} {record.name}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(level: str = "info", fmt: Format = "auto", stream: TextIO | None = None) -> None:
    """Sends all records at `level` and above to stderr; "auto" is text on a terminal, else JSON."""
    stream = stream or sys.stderr
    numeric = logging.getLevelName(level.upper())
    if not isinstance(numeric, int):
        raise ValueError(f"log level {level!r} must be debug, info, warning, error or critical")
    if fmt not in ("auto", "json", "text"):
        raise ValueError(f"log format {fmt!r} must be auto, json or text")
    text = stream.isatty() if fmt == "auto" else fmt == "text"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(numeric)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
