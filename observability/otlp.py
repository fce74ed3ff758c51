"""Exports encoded spans in the background. Imported by `observability.tracing` only where there is an endpoint.

Not by the SDK's exporter: it is given its own spans, which it encodes when they are sent, and that took ten times as
long as `observability.encoded`, in every process, under the GIL. Its names of variables are kept, and its resource.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import random
import threading
import time
from collections.abc import Mapping

from opentelemetry.sdk.resources import Resource

from observability.batches import Batches
from observability.collector import NotTaken, collector, option
from observability.encoded import export_request

log = logging.getLogger(__name__)

SCHEDULE_DELAY_MS = 500  # the SDK's 5 s would let a trace appear in the UI long after its request
_TIMEOUT_S = 10  # of a batch, with all its tries
_FIRST_PAUSE_S = 1.0


class Exporter:
    """Spans go out in batches; those of one that is not taken are counted, and are lost."""

    def __init__(self) -> None:
        environ = os.environ
        self._post = collector(environ)
        self._timeout_s = _number(option(environ, "TIMEOUT"), _TIMEOUT_S, "OTEL_EXPORTER_OTLP_TIMEOUT")
        self._batches: Batches[tuple[str, bytes]] = Batches(
            "trace-exporter",
            self._export,
            gather_s=_of_batches(environ, "SCHEDULE_DELAY", SCHEDULE_DELAY_MS) / 1000,
            most=int(_of_batches(environ, "MAX_EXPORT_BATCH_SIZE", 512)),
            most_waiting=int(_of_batches(environ, "MAX_QUEUE_SIZE", 2048)),
        )
        # Here, since the SDK looks for it with a pool of threads, which cannot begin when a process ends.
        self._resource = {**Resource.create().attributes, "service.version": _version()}
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._ended = self._exported = self._failed = 0

    def export(self, service: str, encoded: bytes) -> None:
        """From any thread; never waits."""
        with self._lock:
            self._ended += 1
        self._batches.put((service, encoded))

    def stats(self) -> dict[str, int]:
        return {"ended": self._ended, "exported": self._exported, "failed": self._failed}

    def flush(self, timeout_s: float) -> bool:
        """Exports what is waiting; False if that takes longer."""
        return self._batches.flush(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Sends what waits, each batch once."""
        self._closing.set()
        self._batches.close(timeout_s)

    def _export(self, batch: list[tuple[str, bytes]]) -> None:
        resources = {service: {**self._resource, "service.name": service} for service, _ in batch}
        try:
            self._deliver(export_request(batch, resources, _version()))
        except NotTaken as error:
            self._failed += len(batch)
            log.warning("%d spans were not exported: %s", len(batch), error)
        else:
            self._exported += len(batch)

    def _deliver(self, request: bytes) -> None:
        until, pause_s = time.monotonic() + self._timeout_s, _FIRST_PAUSE_S
        while True:
            try:
                self._post(request, max(0.001, until - time.monotonic()))
                return
            except NotTaken as error:
                wait_s = error.after_s if error.after_s is not None else pause_s * random.uniform(0.8, 1.2)
                if not error.again or time.monotonic() + wait_s >= until or self._closing.wait(wait_s):
                    raise
            pause_s *= 2


def _of_batches(environ: Mapping[str, str], name: str, default: float) -> float:
    return _number(environ.get(f"OTEL_BSP_{name}", "").strip(), default, f"OTEL_BSP_{name}")


def _number(text: str, default: float, name: str) -> float:
    try:
        number = float(text or default)
    except ValueError:
        number = 0
    if not number > 0:
        raise RuntimeError(f"{name}={text} must be a number above 0.")
    return number


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("triptych")
    except importlib.metadata.PackageNotFoundError:
        return "0"
