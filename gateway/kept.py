"""Where `triptych serve` keeps its traces: set up before its Triton starts, ended after that has stopped.

Of Tritons that others started only the gateway's own spans are kept: their stages were told where theirs go.

Knows no request and no HTTP.
"""

from __future__ import annotations

import logging
import os

from gateway.settings import Settings
from gateway.triton import port_is_free
from observability import tracing
from observability.handover import Receiver, socket_path
from observability.keeping import Traces
from observability.ring import Ring
from observability.triton_spans import TritonSpans

log = logging.getLogger(__name__)


class Kept:
    """Tracing of a gateway and of the Triton that it starts, from before that starts until after it has stopped."""

    def __init__(self, settings: Settings) -> None:
        self.traces: Traces | None = None
        self._receiver: Receiver | None = None
        self._triton_spans: TritonSpans | None = None
        off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
        given = os.environ.pop(tracing.SOCKET, "")  # for the stages below, if anything is kept
        if settings.trace_ring and not off:
            ring = Ring(settings.trace_ring, settings.trace_ring_mb * 1024 * 1024)
            self.traces = Traces(ring, tracing.export, slow_ms=settings.trace_slow_ms)
            if not settings.tritons:
                self._receive(given, int(settings.triton_grpc.rpartition(":")[2]))
        tracing.configure("triptych-gateway", self.traces.take if self.traces else None)

    def close(self) -> None:
        if self._receiver:
            self._receiver.close()
            os.environ.pop(tracing.SOCKET, None)
        if self._triton_spans:
            self._triton_spans.close()
        tracing.shutdown()

    @property
    def triton_spans_url(self) -> str:
        """Where Triton's own spans are taken; "" if they are not."""
        return self._triton_spans.url if self._triton_spans else ""

    def _receive(self, given: str, port: int) -> None:
        assert self.traces
        if not port_is_free(port):  # another's Triton runs there, and its socket is not ours to take
            return
        try:
            path = given or socket_path("traces", port)
            self._receiver = Receiver(path, self.traces.take)
        except OSError as error:
            log.warning("the stages' spans are not kept in memory, only the gateway's: %s", error)
            return
        os.environ[tracing.SOCKET] = path  # Triton inherits it
        self._triton_spans = TritonSpans(tracing.named("triptych-triton"), self.traces.adopt)
