"""A command line for a process that ends with this one, and that has libraries preloaded (`preloaded.h`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Set by the child itself before it becomes the program: a preexec_fn is not safe beside threads.
_START = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    if sys.argv[2]:
        os.environ["LD_PRELOAD"] = ":".join(filter(None, (sys.argv[2], os.environ.get("LD_PRELOAD"))))
    os.execv(sys.argv[3], sys.argv[3:])
"""


def bound(command: Sequence[str], *preloaded: Path) -> list[str]:
    """To be started by the main thread: it is told to end when the thread that started it has."""
    return [sys.executable, "-S", "-c", _START, str(os.getpid()), ":".join(map(str, preloaded)), *command]
