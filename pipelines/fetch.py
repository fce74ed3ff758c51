"""What every source's fetching shares: its one kind of error, its progress, and the disk it fills.

Knows no source, no pipeline and no network.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_FULL_TEXT = ("No space left on device", "Disk quota exceeded", "File too large")
ANOTHER_DISK = "free some space, or set TRIPTYCH_CACHE to a folder on another disk"
BLOCK = 1 << 20
_SPARE = 64 << 20  # bytes of disk left over after a pull: the tokenizer, the lock, somebody's log


class PullError(Exception):
    """A pipeline's files could not be fetched; the message is one sentence with the remedy."""


class Progress:
    """Told what a pull does, from any of its threads. This one is silent but for the log."""

    def notice(self, text: str) -> None:
        """A licence's notice, before its first pull."""
        log.info("%s", text)

    def update(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` bytes; a total of 0 is a phase whose length is unknown."""


class TerminalProgress(Progress):
    """A bar on a terminal; elsewhere a line a phase and a line a quarter."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._phase = ""
        self._since = 0.0
        self._quarter = -1

    def notice(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def update(self, phase: str, done: int, total: int) -> None:
        if phase != self._phase:
            self.close()
            self._phase, self._since, self._quarter = phase, time.monotonic(), -1
        if self._live:
            self._stream.write(f"\r\x1b[K{self._line(done, total)}")
            self._stream.flush()
        elif (quarter := 4 * done // total if total else 0) > self._quarter:
            self._quarter = quarter
            print(self._line(done, total), file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the line that a bar leaves open."""
        if self._live and self._phase:
            self._stream.write("\n")
        self._phase = ""

    def _line(self, done: int, total: int) -> str:
        if not total:
            return self._phase
        speed = done / max(time.monotonic() - self._since, 0.1)
        numbers = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB, {speed / 1e6:.1f} MB/s"
        filled = 24 * done // total
        bar = f"[{'█' * filled}{'·' * (24 - filled)}] " if self._live else ""
        return f"{self._phase}: {bar}{numbers}"


def check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed and free < needed + _SPARE:
        raise PullError(
            f"the disk of {folder.parent} has {free / 1e6:.0f} MB free, and {(needed + _SPARE) / 1e6:.0f} MB "
            f"are needed: {ANOTHER_DISK}."
        )


@contextmanager
def watching(folder: Path, phase: str, total: int, progress: Progress) -> Iterator[None]:
    """Reports the bytes under `folder` meanwhile: that serves every downloader and any version of it."""
    done = threading.Event()

    def watch() -> None:
        while True:
            progress.update(phase, min(_bytes_under(folder), total), total)
            if done.wait(0.2):
                break

    watcher = threading.Thread(target=watch, name="pull-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    progress.update(phase, total, total)


def _bytes_under(folder: Path) -> int:
    """A name counts once: pip downloads a wheel to one folder and then copies it to another."""
    sizes: dict[str, int] = {}
    for file in folder.rglob("*"):
        if size := size_of(file):
            sizes[file.name] = max(size, sizes.get(file.name, 0))
    return sum(sizes.values())


def size_of(file: str | Path) -> int:
    """0 of what is not a file, or is gone meanwhile."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0
