"""The last requests' tensors at every boundary between stages, kept for as long as an operator wants them to be.

Off unless TRIPTYCH_RECORD says how many; TRIPTYCH_RECORD_MB bounds them all. Only traced requests are kept, since it is
by their span that they are asked for. Knows no Triton and no file. Every method may be called from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from pipelines import contracts
from pipelines.pipeline import Pipeline
from pipelines.recording import COMPILED, MIXED, PLAIN, STEPS, Boundary, Recording, made_with

if TYPE_CHECKING:
    from pipelines.chat import Event, Inputs, Prompt
    from pipelines.generate import Row

log = logging.getLogger(__name__)

COUNT, MEGABYTES = "TRIPTYCH_RECORD", "TRIPTYCH_RECORD_MB"
DEFAULT_MB = 64
_IDS = slice(3, 52)  # of a traceparent: the trace's and the span's


class Recorder:
    def __init__(self, pipeline: Pipeline, most: int, most_bytes: int) -> None:
        self._about = made_with(pipeline)
        self._most = most
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Recording] = OrderedDict()  # by handle, the oldest first
        self._sizes: dict[str, int] = {}
        self._counters: Mapping[str, int] = {}  # generate's, as it told them last
        self._before: dict[str, Mapping[str, int]] = {}  # by handle: what they were when it began

    @classmethod
    def of(cls, pipeline: Pipeline, environ: Mapping[str, str]) -> Recorder | None:
        """None where nothing is to be kept. `gateway.settings` has said what is wrong with a value."""
        most = int(environ.get(COUNT) or 0)
        most_bytes = int(environ.get(MEGABYTES) or DEFAULT_MB) * 1024 * 1024
        return cls(pipeline, most, most_bytes) if most else None

    def began(
        self, handle: str, id: str, traceparent: str | None, inputs: Inputs, sampling: str, prompt: Prompt
    ) -> None:
        """A request is about to be submitted to generate."""
        if traceparent is None:
            return
        try:
            held = self._begun(id, traceparent, inputs, sampling, prompt)
        except Exception:  # no request shall fail for being recorded
            log.exception("a request could not be recorded", extra={"request_id": id})
            return
        size = sum(_size(value) for boundary in (held.asked, held.prompt) for value in boundary.values())
        with self._lock:
            self._kept[handle], self._sizes[handle], self._before[handle] = held, size, self._counters
            self._make_room()

    def polled(self, counters: Mapping[str, int]) -> None:
        """Generate's counters, each time before what came with them is told."""
        self._counters = counters

    def told(self, row: Row, event: Event) -> None:
        """Generate has produced something of a request, and this is what postprocess made of it."""
        with self._lock:
            held = self._kept.get(row.id)
            if held is None:
                return
            ids, text = held.answer[contracts.OUTPUT_IDS.name], held.text[contracts.GENERATED_TEXT.name]
            ids += row.output_ids
            held.text[contracts.GENERATED_TEXT.name] = text + "".join(event.texts)
            self._sizes[row.id] += 8 * len(row.output_ids) + sum(map(len, event.texts))
            if row.finish_reason:
                held.answer[contracts.FINISH_REASON.name] = row.finish_reason
                held.text[contracts.FINISH_REASON.name] = event.finish_reason
                held.about[STEPS] = _steps(self._before[row.id], self._counters)
            self._make_room()

    def recording(self, span: str) -> bytes:
        """The file of the request below this span, as `TRACE-SPAN`; of several choices the first's. Else empty."""
        with self._lock:
            found = [held for held in self._kept.values() if held.about["span"] == span]
            first = min(found, key=lambda held: (len(held.about["id"]), held.about["id"]), default=None)
            return first.to_bytes() if first else b""

    def _begun(self, id: str, traceparent: str, inputs: Inputs, sampling: str, prompt: Prompt) -> Recording:
        asked: Boundary = {name: _asked(value) for name, value in inputs.items()}
        asked[contracts.SAMPLING.name] = sampling
        made: Boundary = {
            contracts.INPUT_IDS.name: list(prompt.input_ids),
            contracts.SAMPLING.name: _text(prompt.sampling),
        }
        if prompt.features is not None:
            made[contracts.FEATURES.name] = _bytes(prompt.features)
        if prompt.pictures:
            made[contracts.PICTURES.name] = orjson.dumps(prompt.pictures).decode()
        about = {**self._about, "id": id, "span": traceparent[_IDS], "recorded": time.time()}
        begun: Boundary = {contracts.OUTPUT_IDS.name: []}
        return Recording(about, asked, made, begun, {contracts.GENERATED_TEXT.name: ""})

    def _make_room(self) -> None:
        while len(self._kept) > self._most or (self._kept and sum(self._sizes.values()) > self._most_bytes):
            handle, _ = self._kept.popitem(last=False)
            del self._sizes[handle], self._before[handle]


def _steps(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    """How the steps between were made: what is drawn at random hangs on the last bits, which are not the same."""
    steps, compiled = (now.get(name, 0) - before.get(name, 0) for name in ("steps", "compiled_steps"))
    return PLAIN if compiled == 0 else COMPILED if compiled == steps else MIXED


def _bytes(value: Any) -> bytes:
    """Copied out of whatever holds it: the server takes its memory back."""
    return np.from_dlpack(value).tobytes()


def _asked(value: Any) -> str | list[int] | bytes:
    if isinstance(value, list):
        return value
    return _text(value) if isinstance(value, (str, bytes)) else _bytes(value)


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode()


def _size(value: str | list[int] | bytes) -> int:
    return len(value) * (8 if isinstance(value, list) else 1)
