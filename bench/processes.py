"""The processes a bench starts: free ports, readiness, memory, and an end that leaves nothing behind.

Knows Linux's /proc; not what the processes do.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


class StartError(RuntimeError):
    """A process did not become ready; the message ends with what it last said."""


@contextlib.contextmanager
def running(
    arguments: Sequence[str], log: Path, environ: Mapping[str, str] | None = None, grace_s: float = 40
) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m …` in a session of its own; asked to end afterwards, then killed if it remains."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **(environ or {})},
            start_new_session=True,  # a Ctrl-C here is passed on by us, in order
        )
    try:
        yield process
    finally:
        family = tree(process.pid)
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            pass
        finally:  # even if a second Ctrl-C ends the waiting
            for pid in family:
                if _started_by(pid, process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def terminated_as_exit() -> Iterator[None]:
    """SIGTERM becomes SystemExit, so that the processes above are ended then too."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def wait_ready(process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float) -> None:
    """Until `url` answers 200."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StartError(f"it ended with {process.returncode} instead of serving {url}:\n{_tail(log)}")
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(url, timeout=2) as response:
                if response.status == 200:
                    return
        time.sleep(0.2)
    raise StartError(f"{url} was not ready after {timeout_s:.0f} s:\n{_tail(log)}")


def free_ports(together: int = 1) -> int:
    """The first of so many free ports in a row on loopback.

    None of those the kernel gives to outgoing connections: a client that tries and tries to reach a server that is
    away would in the end be given the very port it calls, connect to itself, and keep the server from coming back.
    """
    lowest = int((_PROC / "sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(1000):
        first = random.randrange(lowest // 2, lowest - together)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + together):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise StartError(f"no {together} free ports in a row")


def tree(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and (stat := _read(entry / "stat")):
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def resident(pids: Sequence[int]) -> dict[str, int]:
    """Bytes in memory of each process, by name and pid; a process that has gone is left out."""
    sizes = {}
    for pid in pids:
        if fields := _read(_PROC / str(pid) / "statm").split():
            sizes[f"{process_name(pid)} ({pid})"] = int(fields[1]) * _PAGE
    return sizes


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time these processes have used, with that of their children that have ended."""
    ticks = 0
    for pid in pids:
        if stat := _read(_PROC / str(pid) / "stat"):
            ticks += sum(map(int, stat.rpartition(")")[2].split()[11:15]))  # utime, stime, cutime, cstime
    return ticks / _TICKS_PER_S


def shared_memory(pids: Sequence[int]) -> int:
    """Bytes in /dev/shm of the files these processes have mapped: other servers may use the folder too."""
    files = set()
    for pid in pids:
        for match in re.finditer(r"^\S+ \S+ \S+ \S+ \S+ +(/dev/shm/\S+)$", _read(_PROC / str(pid) / "maps"), re.M):
            files.add(match[1])
    total = 0
    for file in files:
        with contextlib.suppress(OSError):
            total += os.stat(file).st_blocks * 512
    return total


def is_zombie(pid: int) -> bool:
    """Whether it has ended and nobody has asked how."""
    return _read(_PROC / str(pid) / "stat").rpartition(")")[2].split()[:1] == ["Z"]


def process_name(pid: int) -> str:
    """What a person would call it: the model of a stub, the module of a Python, else the program."""
    words = [word for word in _read(_PROC / str(pid) / "cmdline").split("\0") if word]
    if not words:
        return "?"
    program = Path(words[0]).name
    if "stub" in program:
        for word in words[1:]:
            if match := re.search(r"/([^/]+)/\d+/model\.py$", word):
                return f"stub {match[1]}"
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    return program


def _started_by(pid: int, session: int) -> bool:
    """Whether it still is the process we listed: its session tells it from another of the same number."""
    stat = _read(_PROC / str(pid) / "stat")
    return bool(stat) and int(stat.rpartition(")")[2].split()[3]) == session


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(_read(log).splitlines()[-lines:])
