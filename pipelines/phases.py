"""How long each part of a load takes, from the start of this process on: spawn, import, weights, warm_up.

A process that runs a stage imports this first, and one that was forked with its imports done calls `begin`: what comes
before is the spawn. Knows no stage.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

NAMES = ("spawn", "import", "weights", "warm_up")


def _started() -> float:
    """When the kernel started this process, on the monotonic clock, to a hundredth (proc(5): field 22)."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK") + time.monotonic() - time.clock_gettime(time.CLOCK_BOOTTIME)


def begin() -> None:
    """What comes now is the import."""
    global _began, _spawned
    _began = time.monotonic()
    _spawned = max(0.0, _began - _started())


_began = _spawned = 0.0
begin()


class Phases:
    """One load's, each ended by its name; what is between two ends belongs to the second.

    `imported` is called when all is imported.
    """

    def __init__(self, imported: Callable[[], None] = lambda: None) -> None:
        self._imported = imported
        self.seconds = dict.fromkeys(NAMES, 0.0) | {"spawn": _spawned}
        self._at = _began

    def end(self, name: str) -> None:
        if name == "import":
            self._imported()
        now = time.monotonic()
        self.seconds[name] += now - self._at
        self._at = now
