"""How the stages' spans reach the process that keeps them: datagrams on a Unix socket, each a batch of encoded spans.

A datagram is a service's name, a line's end, and its spans: each `1` if it is sampled, else `0`, four bytes of how long
it is, and itself.

A datagram needs no connection: its sender does not notice that the receiver has started anew, and what is sent while
there is none is dropped and counted. Nobody who ends a span waits: a thread sends. Knows nothing of what spans say.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from observability.batches import Batches
from observability.encoded import trace_id_of

log = logging.getLogger(__name__)

Take = Callable[[str, str, bool, bytes], object]  # trace id, service, sampled, encoded

_BATCH_BYTES = 60_000  # far below what a socket's buffer holds by default
_GATHER_S = 0.05  # spans of a request end together: one datagram, and few wake-ups
_SEND_S = 1.0  # for a receiver that does not keep up
_MOST, _MOST_WAITING = 128, 4096
_MOST_BYTES = 1024 * 1024
_HEAD = struct.Struct(">cI")  # of a span: whether it is sampled, and how long it is


class Sender:
    """`send` from any thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._out.settimeout(_SEND_S)
        self._lost = 0
        self._batches: Batches[tuple[str, bool, bytes]] = Batches(
            "trace-sender", self._send, gather_s=_GATHER_S, most=_MOST, most_waiting=_MOST_WAITING
        )

    @property
    def dropped(self) -> int:
        return self._batches.dropped + self._lost

    def send(self, trace_id: str, service: str, sampled: bool, encoded: bytes) -> None:
        self._batches.put((service, sampled, encoded))

    def close(self, timeout_s: float = _SEND_S) -> None:
        """Sends what waits, if the receiver takes it."""
        self._batches.close(timeout_s)
        self._out.close()

    def _send(self, batch: list[tuple[str, bool, bytes]]) -> None:
        while batch:
            service, size, count = batch[0][0], 0, 0
            parts: list[bytes] = []
            for name, sampled, encoded in batch:
                if name != service or size >= _BATCH_BYTES // 2:
                    break
                parts += (_HEAD.pack(b"1" if sampled else b"0", len(encoded)), encoded)
                size, count = size + len(encoded), count + 1
            del batch[:count]
            try:
                self._out.sendto(b"".join([service.encode(), b"\n", *parts]), self._path)
            except OSError:  # nobody receives, or does not keep up, or one span is too large
                self._lost += count


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
        buffer = bytearray(_MOST_BYTES)  # one: as many bytes for each datagram would leave holes in the heap
        while not self._closing:
            try:
                datagram = bytes(memoryview(buffer)[: self._socket.recv_into(buffer)])
            except OSError:
                return
            if not datagram:
                continue
            service, end, _ = datagram.partition(b"\n")
            for sampled, encoded in _spans(datagram, len(service) + len(end)):
                trace_id = trace_id_of(encoded)
                if trace_id is None:
                    self.unreadable += 1
                    continue
                try:
                    self._take(trace_id, service.decode(errors="replace"), sampled, encoded)
                except Exception:  # one bad span is not the end of all others'
                    log.exception("a span could not be kept")


def _spans(datagram: bytes, at: int) -> Iterator[tuple[bool, bytes]]:
    """Those of a datagram from there on; of one that is cut off, nothing."""
    while len(datagram) - at >= _HEAD.size:
        sampled, size = _HEAD.unpack_from(datagram, at)
        at += _HEAD.size
        yield sampled == b"1", datagram[at : at + size] if at + size <= len(datagram) else b""
        at += size


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
