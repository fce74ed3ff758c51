"""A structure tried out where it can do no harm: in a child process with a little time.

llguidance has limits of its own, and they do not hold everything: intersected patterns can take it minutes, and a
grammar of thousands of rules, each within the other, overflows its stack, which ends the process. Knows nothing of
grammars but that `grammar.try_out` raises a StageError.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import select
import signal
from functools import lru_cache

from pipelines.errors import StageError
from pipelines.grammar import refused, try_out
from pipelines.structure import Structure

CPU_S = 2
_WALL_S = 5.0  # where the processor is busy with others
_FINE = b"+"


@lru_cache(maxsize=256)
def check(structure: Structure, special_tokens: tuple[str, ...] = ()) -> None:
    """A StageError if a structure cannot be followed, or if that cannot be found out in time."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        _tell(send, structure, special_tokens)
    os.close(send)
    try:
        said = _read(receive)
    finally:
        os.close(receive)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if not said:
        raise refused("it is too large, too deeply nested or too complex")
    if said != _FINE:
        raise StageError.from_text(said.decode(), stage="preprocess")


def _tell(send: int, structure: Structure, special_tokens: tuple[str, ...]) -> None:
    """The child's whole life. Whatever happens, it does not return into a copy of its parent."""
    try:
        faulthandler.disable()  # if it is on: an overflow here is no news
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        try:
            try_out(structure, special_tokens)
            said = _FINE
        except StageError as error:
            said = error.to_json().encode()
        os.write(send, said)
    finally:
        os._exit(0)


def _read(receive: int) -> bytes:
    """What the child says: little enough for one piece. Nothing, if it ends or takes too long."""
    poll = select.poll()
    poll.register(receive, select.POLLIN)
    return os.read(receive, 65536) if poll.poll(_WALL_S * 1000) else b""
