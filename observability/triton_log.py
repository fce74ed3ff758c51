"""Triton's log file told in this process's own log, a line at a time: the server's lines and its stages'.

The server and the stages go on writing to a file, never to a pipe: whoever reads them may be slow, or stop, and they
never wait. A thread looks at what has been added. It tells so many lines a second at most; what comes faster is counted
(`triptych_log_lines_dropped_total`), and is in the file. Knows no request: a stage's JSON line brings its own ids.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from observability import metrics
from observability.logs import FIELDS

log = logging.getLogger(__name__)

EVERY_S = 0.2
MOST_LINES = 200  # told a look
_LOOKED_AT = 10  # times as many are looked at: most are not worth telling
# A read asks for as much memory first and gives back what it did not need: of a megabyte, five times a second, the
# heap was one larger for good once other memory had come to lie in the gap (after 150 loads of a pipeline).
_BLOCK = 1 << 16
_FAR_BEHIND = 8 << 20  # so much more than is read at a time: what lies between is counted and left
_LONGEST = 1 << 16

# I1121 14:06:51.990273 14402 model_lifecycle.cc:472] "loading: generate:1"
_SERVERS = re.compile(r"([IWEF])\d{4} [\d:.]+ +\d+ ([\w./-]+):\d+\] *(.*)")
# Its info is of its own workings, and says little that the gateway does not.
_LEVELS = {"I": logging.DEBUG, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
_TABLE = re.compile(r"[+|]|\s*$|.*%\|")  # of models and options at the start; a progress bar
# What a server says, as warnings and errors, wherever there is no GPU. There it means nothing.
_WITHOUT_GPU = re.compile(
    "pinned system memory|CudaDriverHelper|CUDA driver version is insufficient|DCGM unable|initialize NVML"
)
_DRIVER = Path("/proc/driver/nvidia/version")
_SIGNAL = "Signal (15) received."  # we sent it


class Follower:
    """`start`, and `stop` when the server has ended."""

    def __init__(self, file: Path, *, every_s: float = EVERY_S, most_lines: int = MOST_LINES) -> None:
        self._file = file
        self._every_s = every_s
        self._most_lines = most_lines
        self._expected = None if _DRIVER.exists() else _WITHOUT_GPU
        self._stopping = threading.Event()
        self._rest = b""
        self._thread = threading.Thread(target=self._follow, name="triton log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What is written by now is told first."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def _follow(self) -> None:
        while not self._file.exists():
            if self._stopping.wait(self._every_s):
                return
        with self._file.open("rb") as opened:
            while True:
                last = self._stopping.is_set()
                try:
                    self._look(opened)
                except Exception:  # a line must not be the end of all that follow
                    log.exception("a part of Triton's log could not be read")
                if last:
                    self._tell(self._rest)
                    return
                self._stopping.wait(self._every_s)

    def _look(self, opened: BinaryIO) -> None:
        """Tell what has been added since the last look."""
        told, looked_at, dropped = 0, 0, self._catch_up(opened)
        for _ in range(_FAR_BEHIND // _BLOCK + 1):
            if not (block := opened.read(_BLOCK)):
                break
            *lines, self._rest = (self._rest + block).split(b"\n")
            if len(self._rest) > _LONGEST:
                lines, self._rest = [*lines, self._rest], b""
            for number, line in enumerate(lines):
                if told == self._most_lines or looked_at == _LOOKED_AT * self._most_lines:
                    dropped += len(lines) - number
                    break
                looked_at += 1
                told += self._tell(line)
        if dropped:
            metrics.LOG_LINES_DROPPED.inc(dropped)
            log.warning("%d lines of Triton's log came too fast; they are in %s", dropped, self._file)

    def _catch_up(self, opened: BinaryIO) -> int:
        """Leave out what is too much to look at; answers how many lines that was."""
        lines, here = 0, opened.tell()
        behind = opened.seek(0, 2) - here
        opened.seek(here)
        while behind > _FAR_BEHIND:
            block = opened.read(_BLOCK)
            lines, behind = lines + block.count(b"\n"), behind - len(block)
        if lines:
            self._rest = b""
            lines += opened.readline().endswith(b"\n")
        return lines

    def _tell(self, line: bytes) -> bool:
        record = self._record(line[:_LONGEST].decode(errors="replace").rstrip("\r"))
        if record is None or not logging.getLogger(record.name).isEnabledFor(record.levelno):
            return False
        logging.getLogger(record.name).handle(record)
        return True

    def _record(self, line: str) -> logging.LogRecord | None:
        """As the line says of itself; None for what is no message."""
        if line.startswith("{") and (stages := _stages(line)):
            return stages
        if found := _SERVERS.match(line):
            level, file, message = found.groups()
            numeric = logging.DEBUG if self._is_expected(message) else _LEVELS[level]
            return _made(numeric, f"triton.{file}", _unquoted(message))
        if _TABLE.match(line):
            return None
        quiet = line == _SIGNAL or self._is_expected(line)
        return _made(logging.DEBUG if quiet else logging.WARNING, "triton", line)

    def _is_expected(self, message: str) -> bool:
        return self._expected is not None and bool(self._expected.search(message))


def _made(level: int, name: str, message: str, fields: Mapping[str, Any] | None = None) -> logging.LogRecord:
    made = {"name": name, "levelno": level, "levelname": logging.getLevelName(level), "msg": message}
    return logging.makeLogRecord({**made, "source": "triton", **(fields or {})})


def _stages(line: str) -> logging.LogRecord | None:
    """A line that `observability.logs` wrote in a stage's process; None if it is another's."""
    try:
        said = json.loads(line)
        message, level = str(said["message"]), logging.getLevelName(said["level"].upper())
        created = datetime.fromisoformat(said["time"].replace("Z", "+00:00")).timestamp()
        fields = {name: said[name] for name in (*FIELDS, "traceback") if name in said}
        made = _made(level, str(said["logger"]), message, fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    made.created, made.msecs = created, created % 1 * 1000
    return made if isinstance(level, int) else None


def _unquoted(message: str) -> str:
    """The server writes a message as a JSON string, most of the time."""
    if message.startswith('"'):
        try:
            return str(json.loads(message, strict=False))
        except ValueError:
            return message.strip('"')
    return message
