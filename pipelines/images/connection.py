"""A connection that ends at a deadline, whatever the other side does: resolving, connecting, TLS, reading.

Knows no HTTP and no policy: `resolved` says which addresses a host has, `connected` goes to those it is given.
"""

from __future__ import annotations

import io
import queue
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

_MAX_ADDRESSES = 16
# getaddrinfo cannot be interrupted: so many threads may be left behind in it, and one more waits for one of them.
_resolving = threading.BoundedSemaphore(32)


class Failed(Exception):
    """A clause that goes on from the name of the part: "could not be fetched: ..."."""


class Address(NamedTuple):
    family: int
    target: tuple[Any, ...]  # as connect() takes it

    @property
    def number(self) -> str:
        return str(self.target[0])


class Deadline:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, more than none. Failed when it is over."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.over()
        return left

    def over(self) -> Failed:
        return Failed(f"could not be fetched within {self._seconds:g} s")


def resolved(host: str, port: int, deadline: Deadline) -> list[Address]:
    """Every address of the host, asked for once."""
    answer: queue.SimpleQueue[list[Address] | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answer.put([Address(family, target) for family, _, _, _, target in found])
        except (OSError, UnicodeError):
            answer.put(None)
        finally:
            _resolving.release()

    if not _resolving.acquire(timeout=deadline.left()):
        raise deadline.over()
    threading.Thread(target=ask, daemon=True, name="resolve").start()
    try:
        addresses = answer.get(timeout=deadline.left())
    except queue.Empty:
        raise deadline.over() from None
    if not addresses:
        raise Failed("could not be fetched: its host has no address")
    return addresses


def connected(addresses: Sequence[Address], host: str, secure: bool, deadline: Deadline) -> Connection:
    """To the first address that answers; with TLS the certificate must be the host's."""
    addresses = addresses[:_MAX_ADDRESSES]
    for index, address in enumerate(addresses):
        plain = socket.socket(address.family, socket.SOCK_STREAM)
        try:
            plain.settimeout(
                deadline.left() / (len(addresses) - index)
            )  # one that is silent leaves time for the others
            plain.connect(address.target)
        except OSError:
            plain.close()
            continue
        except BaseException:
            plain.close()
            raise
        return Connection(_secured(plain, host, deadline) if secure else plain, deadline)
    deadline.left()
    raise Failed("could not be fetched: its host does not answer")


def _secured(plain: socket.socket, host: str, deadline: Deadline) -> ssl.SSLSocket:
    try:
        plain.settimeout(deadline.left())  # of the handshake as a whole
        return _tls().wrap_socket(plain, server_hostname=host)
    except ssl.SSLCertVerificationError:
        plain.close()
        raise Failed("could not be fetched: its host's certificate is not valid") from None
    except TimeoutError:
        plain.close()
        raise deadline.over() from None
    except (OSError, ValueError):
        plain.close()
        raise Failed("could not be fetched: its host does not speak TLS that can be trusted") from None


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class Connection(io.RawIOBase):
    """Reads and writes until the deadline: every read gets only what time is left, so slow drips end too."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        super().__init__()
        self._socket = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        try:
            self._socket.settimeout(self._deadline.left())
            return self._socket.recv_into(buffer)  # type: ignore[arg-type]
        except TimeoutError:
            raise self._deadline.over() from None

    def send(self, data: bytes) -> None:
        try:
            self._socket.settimeout(self._deadline.left())
            self._socket.sendall(data)
        except TimeoutError:
            raise self._deadline.over() from None

    def makefile(self, mode: str) -> io.BufferedReader:
        """As http.client asks a socket for it."""
        return io.BufferedReader(self)

    def close(self) -> None:
        self._socket.close()
        super().close()
