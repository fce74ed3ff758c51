"""A measured engine's side of a pipe: calls come as JSON lines on stdin, answers go as JSON lines to stdout.

Standard library alone, because llama.cpp's worker runs in an environment of its own. Knows no engine: it is given what
answers each call.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping

PARENT = "TRIPTYCH_BENCH_PARENT"  # the pid of the bench, in a worker's environment
_PR_SET_PDEATHSIG = 1


def serve(handlers: Mapping[str, Callable[..., object]]) -> None:
    """Answers calls, one after the other, until stdin ends. Between two it is blocked, and takes no time of others."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not be read as an answer
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = {"result": handlers[arguments.pop("call")](**arguments)}
        except Exception as error:  # the bench is told, and goes on without this peer
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def die_with_parent() -> None:
    """The kernel kills this process when the bench goes, however that goes: a measurement would load the machine on."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != os.environ.get(PARENT, str(os.getppid())):  # it went before the line above
        os.kill(os.getpid(), signal.SIGKILL)
