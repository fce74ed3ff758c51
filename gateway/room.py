"""How many bytes of request bodies the gateway holds at once: bodies with pictures are large, and may wait for long.

Knows no HTTP. Whoever has a share gives it back by leaving it, so nothing is counted twice or forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.errors import StageError

FREE = 64 * 1024  # of each body: few large ones must not keep the small ones out


class Room:
    """So many bytes, for all requests together."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        share = Share(self)
        try:
            yield share
        finally:
            self.held -= share.held


class Share:
    """What one request holds of it."""

    def __init__(self, room: Room) -> None:
        self.held = 0
        self._room = room
        self._size = 0

    def take(self, size: int) -> None:
        """So much more, or StageError, `overloaded`."""
        self._size += size
        more = max(0, self._size - FREE) - self.held
        if self._room.held + more > self._room.size:
            raise StageError("The server holds as many bytes of requests as it may; try again.", code="overloaded")
        self._room.held += more
        self.held += more
