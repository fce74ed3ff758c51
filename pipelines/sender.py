"""A response sender that is not touched after its last response, nor asked anything beside it. Knows no Triton.

Triton 2.51 frees a request's response factory with its final flag, and `is_cancelled()` then, or at that moment from
another thread, is a segmentation fault of the whole server (TRITONBACKEND_ResponseFactoryIsCancelled; a soak found it).
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

FINAL = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL


class RawSender(Protocol):
    """The backend's InferenceResponseSender."""

    def send(self, response: Any = None, flags: int = 0) -> None: ...

    def is_cancelled(self) -> bool: ...


class Sender:
    """Every method may be called from any thread; what comes after the final flag is dropped."""

    def __init__(self, raw: RawSender) -> None:
        self._raw = raw
        self._lock = threading.Lock()
        self._ended = False

    def send(self, response: Any = None, *, final: bool = False) -> bool:
        """Answers whether it was sent: not if the last response was before."""
        with self._lock:
            if self._ended:
                return False
            self._ended = final
            if response is None:
                self._raw.send(flags=FINAL if final else 0)
            else:
                self._raw.send(response, flags=FINAL if final else 0)
            return True

    def is_cancelled(self) -> bool:
        """Whether the client has gone; False once all is said, for then it does not matter."""
        with self._lock:
            return not self._ended and bool(self._raw.is_cancelled())
