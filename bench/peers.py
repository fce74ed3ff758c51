"""The engines that are measured, each a process of its own that waits, blocked, while another has its turn.

Knows the calls (`load`, `decode`, `prefill`, see `worker`) and how each process is started; no engine and no ratio.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench import processes, rounds, worker
from bench.prompts import Prompts

ROOT = Path(__file__).resolve().parents[1]
CALL_S = 600.0
LOAD_S = 900.0
END_S = 5.0
_SPIN_S = 0.05  # threads that OpenMP leaves spinning after a parallel loop are asleep by then
_QUIET = 0.1  # of a core, over a second: what is left when nothing is being built


class PeerError(RuntimeError):
    """A peer could not be started or measured; the message is the reason that the bench reports."""


class Peer:
    """One engine in its process. `tokens` limits what it decodes, for one that would take the bench's whole time."""

    def __init__(
        self, name: str, module: str, *, python: str = sys.executable, threads: int, tokens: int | None = None
    ) -> None:
        self.name = name
        self.info: dict[str, Any] = {}
        self._tokens = tokens
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 closed with the peer
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**environ, worker.PARENT: str(os.getpid())},
            cwd=ROOT,
            start_new_session=True,  # to end it with its children
        )

    def load(self, **arguments: Any) -> None:
        self.info = self.call("load", LOAD_S, **arguments)

    def measure(self, measure: rounds.Measure, prompts: Prompts, name: str) -> float:
        """Tokens a second. `name` makes the prompts differ from those of every other measurement."""
        time.sleep(_SPIN_S)
        ids = [prompts(f"{name} {self.name} {number}", measure.prompt) for number in range(measure.streams)]
        if not measure.tokens:
            return measure.prompt / float(self.call("prefill", CALL_S, prompt=ids[0]))
        tokens = min(measure.tokens, self._tokens or measure.tokens)
        found = self.call("decode", CALL_S, prompts=ids, tokens=tokens)
        try:
            return (rounds.together if found["at_once"] else rounds.one_by_one)(found["times"])
        except ValueError as error:
            raise PeerError(f"{measure.name}: {error}") from None

    def call(self, call: str, timeout_s: float, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        started = time.monotonic()  # before the watchdog's time begins: what it ends took too long
        watchdog = threading.Timer(timeout_s, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            watchdog.cancel()
        if not line:
            late = "took too long" if time.monotonic() - started >= timeout_s else "ended"
            raise PeerError(f"{self.name} {late} in {call!r}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer["result"]

    def settle(self, limit_s: float) -> bool:
        """Waits until the process, which is asked nothing now, builds nothing in the background; whether it stopped."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            before = processes.cpu_seconds(processes.tree(self._process.pid))
            time.sleep(1)
            if processes.cpu_seconds(processes.tree(self._process.pid)) - before < _QUIET:
                return True
        return False

    def close(self) -> None:
        """Asks by the end of stdin, and then ends all that is left of its session."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._process.stdin.close()
                self._process.wait(END_S)
        finally:
            end_session(self._process)
            self._process.stdout.close()
            self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.wait()}"


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that leads a session, and what it started; nothing if all have gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
