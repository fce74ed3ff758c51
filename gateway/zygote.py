"""The zygote of one Triton (`pipelines.zygote`): built, started, kept running and ended. Knows no stage.

Where it cannot run, stages import what they need by themselves, at every load.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from gateway import installed
from gateway.bound import bound
from observability.handover import socket_path
from pipelines import zygote
from pipelines.compiler import CompilerError

log = logging.getLogger(__name__)

_TITLE = " " * 4000  # a stage's own arguments are shown in this one's place


class Zygote:
    """`start`, then `stop` (always). Raises CompilerError, or OSError, where there can be none."""

    def __init__(self, port: int) -> None:
        self.stand_in = installed.stand_in()
        self._library = installed.zygote_library()
        self._socket = socket_path("zygote", port)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def variables(self) -> dict[str, str]:
        """What the stand-ins of stages have to know."""
        return {zygote.SOCKET: self._socket}

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def start(self, environment: Mapping[str, str], log_file: Path) -> None:
        """Unless it runs. With Triton's own environment: stages have theirs from here."""
        if self._process and self._process.poll() is None:
            return
        self._unlink()
        with log_file.open("ab") as said:
            self._process = subprocess.Popen(
                bound([str(installed.stub()), _TITLE], self._library),
                env={**environment, **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # as Triton
            )

    def warm(self) -> None:
        """Has torch imported before anybody needs it; asked in vain where it does not listen yet."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            asking.connect(self._socket)
            asking.send(zygote.WARM)

    def stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
        self._unlink()

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._socket)


def zygote_for(port: int) -> Zygote | None:
    """None where there is no compiler, or no place for its socket: the log says so."""
    try:
        return Zygote(port)
    except (CompilerError, OSError) as error:
        log.warning("every load imports everything anew, which takes seconds: %s", error)
        return None
