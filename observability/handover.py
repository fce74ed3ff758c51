"""How the stages' spans reach the process that keeps them: datagrams on a Unix socket, each a batch of encoded spans.

A datagram needs no connection: its sender does not notice that the receiver has started anew, and what is sent while
there is none is dropped and counted. Nobody who ends a span waits: a thread sends. Knows nothing of what spans say.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from observability.spans import SpanData, encode, trace_id_of

log = logging.getLogger(__name__)

Take = Callable[[str, str, bool, bytes], None]  # trace id, service, sampled, encoded

_BATCH_BYTES = 60_000  # far below what a socket's buffer holds by default
_GATHER_S = 0.02  # spans of a request end together: one datagram, and few wake-ups
_SEND_S = 1.0  # for a receiver that does not keep up
_MOST_WAITING = 4096
_MOST_BYTES = 1024 * 1024


class Sender:
    """`send` from any thread. Its thread starts with the first span, and again in a forked child."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._waiting: deque[SpanData] = deque()
        self._arrived = threading.Event()
        self._start = threading.Lock()
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._closing = False
        self.dropped = 0

    def send(self, span: SpanData) -> None:
        if len(self._waiting) >= _MOST_WAITING:
            self.dropped += 1
            return
        self._waiting.append(span)
        if self._pid != os.getpid():
            self._begin()
        if not self._arrived.is_set():
            self._arrived.set()

    def close(self) -> None:
        """Sends what waits, if the receiver takes it."""
        self._closing = True
        self._arrived.set()
        if self._thread and self._pid == os.getpid():
            self._thread.join()

    def _begin(self) -> None:
        with self._start:
            if self._pid != os.getpid() and not self._closing:
                self._pid = os.getpid()
                self._thread = threading.Thread(target=self._run, name="trace-sender", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(_SEND_S)
            while not (self._closing and not self._waiting):
                self._arrived.wait()
                if not self._closing:
                    time.sleep(_GATHER_S)
                self._arrived.clear()
                while self._waiting:
                    self._send_batch(out)

    def _send_batch(self, out: socket.socket) -> None:
        service, lines, size = self._waiting[0].service, [], 0
        while self._waiting and size < _BATCH_BYTES // 2 and self._waiting[0].service == service:
            span = self._waiting.popleft()
            lines.append((b"1" if span.sampled else b"0") + encode(span))
            size += len(lines[-1])
        try:
            out.sendto(b"\n".join([service.encode(), *lines]), self._path)
        except OSError:  # nobody receives, or does not keep up, or one span is too large
            self.dropped += len(lines)


class Receiver:
    """Takes what the senders send, from a thread, until closed. Only this user's processes can send."""

    def __init__(self, path: str, take: Take) -> None:
        self.path = path
        self._take = take
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # a predecessor's
        previous = os.umask(0o177)
        try:
            self._socket.bind(path)
        finally:
            os.umask(previous)
        self._inode = os.lstat(path).st_ino
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _MOST_BYTES)
        self._closing = False
        self.unreadable = 0
        self._thread = threading.Thread(target=self._run, name="trace-receiver", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self._socket.shutdown(socket.SHUT_RD)  # wakes the thread
        self._thread.join(timeout=2)
        self._socket.close()
        with contextlib.suppress(OSError):
            if os.lstat(self.path).st_ino == self._inode:  # and not a successor's
                os.unlink(self.path)

    def _run(self) -> None:
        while not self._closing:
            try:
                datagram = self._socket.recv(_MOST_BYTES)
            except OSError:
                return
            if not datagram:
                continue
            service, *lines = datagram.split(b"\n")
            for line in lines:
                trace_id = trace_id_of(line[1:])
                if trace_id is None:
                    self.unreadable += 1
                    continue
                try:
                    self._take(trace_id, service.decode(errors="replace"), line[:1] == b"1", line[1:])
                except Exception:  # one bad span is not the end of all others'
                    log.exception("a span could not be kept")


def socket_path(kind: str, port: int) -> str:
    """A socket of the gateway of the Triton on this port, in a folder of this user alone. Raises OSError.

    Not in the cache folder: a socket's path may have 107 bytes.
    """
    folder = Path(tempfile.gettempdir()) / f"triptych-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone")
    return str(folder / f"{kind}-{port}.sock")
