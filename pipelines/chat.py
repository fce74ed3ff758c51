"""The orchestration of a chat: the three stages in order, for all requests at once. Knows no Triton and no HTTP.

A request is started once: preprocess, then submit to generate. From then on `turn` moves all of them together: one
poll of generate, one call of postprocess, one message to each sink (DESIGN §3). Stop strings end generation in the
engine itself (`Postprocess.stop_checker`), so no feedback is needed here; cancel is the one control call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from pipelines import terms
from pipelines.errors import StageError
from pipelines.sampling import Sampling
from pipelines.terms import Terms

if TYPE_CHECKING:  # not for the sake of a name: postprocess needs no engine
    import numpy as np

    from pipelines.engine import Logprob
    from pipelines.generate import Poll, Row
    from pipelines.logprobs import Entry
    from pipelines.recorder import Recorder


_NONE: Mapping[str, float] = MappingProxyType({})


class Window(NamedTuple):
    """One request's input to postprocess: the ids that may still matter, and how many of them are new.

    `logprobs` are of the last of them, where they are asked for: those that have not gone out with their text.
    """

    ids: list[int]
    new: int
    sent: int
    stop: Sequence[str]
    final: bool
    logprobs: Sequence[Logprob] = ()


class Text(NamedTuple):
    """Its output: the texts to send (one, or one for each new id), how many ids to forget, and `sent` to keep.

    `stopped`: a stop string is complete. `logprobs`: the entries of each text, where they are asked for; the first
    `told` of those that waited are then to be forgotten.
    """

    texts: list[str]
    drop: int
    sent: int
    stopped: bool = False
    logprobs: Sequence[list[Entry]] = ()
    told: int = 0


class Event(NamedTuple):
    """What a listener hears of one request. The first carries `prompt_tokens`, the last `finish_reason` or `error`.

    `pictures` come with the first: the width and height of each that the prompt has. `logprobs` are the entries of
    each of the texts, where they are asked for.
    """

    id: str
    texts: list[str]
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stages: Mapping[str, float] = _NONE
    error: StageError | None = None
    logprobs: Sequence[list[Entry]] = ()
    cached_tokens: int = 0
    pictures: Sequence[tuple[int, int]] = ()

    @property
    def last(self) -> bool:
        return bool(self.finish_reason or self.error)


def finish_reason_of(engines: str, stopped: bool) -> str:
    """The engine goes by settled text: only the very end of an answer that it cut off may show a stop string."""
    return "stop" if stopped and engines == "length" else engines


Inputs: TypeAlias = "Mapping[str, bytes | str | Sequence[int] | np.ndarray[Any, Any]]"  # by tensor: text, ids, an image


class Prompt(NamedTuple):
    """What preprocess makes of a request. `features` are what generate takes of its pictures, which are nothing to
    whoever hands them on; `pictures` are the sizes of those, width and height.
    """

    input_ids: Sequence[int]
    sampling: str
    features: object | None = None
    pictures: Sequence[tuple[int, int]] = ()


class Stages(Protocol):
    """The three stages, as this module calls them. Each raises StageError."""

    def preprocess(self, inputs: Inputs, sampling: str, traceparent: str | None) -> Prompt: ...

    def submit(self, id: str, prompt: Prompt, asked: Terms, traceparent: str | None) -> None: ...

    def poll(self, wait_s: float) -> Poll: ...

    def cancel(self, id: str) -> None: ...

    def postprocess(self, windows: list[Window]) -> list[Text]: ...

    def trace_postprocess(self, traceparent: str, start_ns: int, end_ns: int, calls: int, busy_ns: int) -> None: ...


class Sink(Protocol):
    """Where a request's events go. Both calls come from several threads; a lane outlives its requests, a stream ends
    with its last event."""

    def push(self, event: Event) -> None: ...

    def flush(self, counters: Mapping[str, int], *, now: float) -> bool:
        """Send what waits, if it is time; answers whether something still waits."""

    def gone(self) -> bool:
        """Whether nobody listens any more. A round trip to the server: not for every turn."""

    def end(self) -> None:
        """Nothing more comes. The server keeps a request, gone or not, until it is told."""


HEARTBEAT_S = 0.5  # an idle poll answers after this; a lane has a message at least this often
COALESCE_S = 0.02  # a per-request stream's events wait this long for company
_GONE_EVERY_S = 0.25


@dataclass
class _Live:
    id: str
    sink: Sink
    stop: Sequence[str] = ()
    traceparent: str | None = None
    admitted: float = field(default_factory=time.monotonic)
    prompt_tokens: int = 0
    pictures: Sequence[tuple[int, int]] = ()
    announced: bool = False
    cancelled: bool = False
    completion_tokens: int = 0
    cached_tokens: int = 0
    window: list[int] = field(default_factory=list)
    sent: int = 0
    logprobs: list[Logprob] = field(default_factory=list)  # of the window's last ids, not told yet
    preprocess_ms: float = 0
    text_calls: int = 0
    text_busy_ns: int = 0
    text_first_ns: int = 0


class Chat:
    """All requests of one pipeline. Every method but `turn` may be called from any thread; `turn` from one."""

    def __init__(self, stages: Stages, recorder: Recorder | None = None) -> None:
        self._stages = stages
        self._recorder = recorder
        self._lock = threading.Lock()
        self._live: dict[str, _Live] = {}
        self._lanes: list[Sink] = []
        self._waiting = False
        self._gone_checked = 0.0

    @property
    def idle(self) -> bool:
        """Whether nobody listens: no lane, no live request."""
        return not self._lanes and not self._live

    def attach(self, lane: Sink) -> None:
        """A listener that is there before and after its requests, and wants heartbeats."""
        with self._lock:
            self._lanes.append(lane)

    def detach(self, sink: Sink) -> None:
        """The listener has gone: what it asked for is cancelled."""
        with self._lock:
            if sink in self._lanes:
                self._lanes.remove(sink)
            orphans = [handle for handle, live in self._live.items() if live.sink is sink]
        for handle in orphans:
            self.cancel(handle)

    def admit(self, handle: str, id: str, sink: Sink, traceparent: str | None) -> None:
        """From here on a cancel finds the request. `handle` is its name here, `id` its listener's name for it."""
        with self._lock:
            if handle in self._live:
                raise StageError(f"request {id!r} is running already", stage="orchestrator")
            self._live[handle] = _Live(id, sink, traceparent=traceparent)

    def start(self, handle: str, inputs: Inputs, sampling: str, asked: Terms = terms.DEFAULT) -> None:
        """Preprocess and submit an admitted request; whatever goes wrong, its sink is told."""
        with self._lock:
            live = self._live.get(handle)
        if live is None:  # cancelled already
            return
        try:
            started = time.perf_counter()
            prompt = self._stages.preprocess(inputs, sampling, live.traceparent)
            live.preprocess_ms = (time.perf_counter() - started) * 1e3
            live.stop, live.prompt_tokens = Sampling.from_json(prompt.sampling).stop, len(prompt.input_ids)
            live.pictures = prompt.pictures
            if self._recorder:
                self._recorder.began(handle, live.id, live.traceparent, inputs, sampling, prompt)
            left = asked.after(time.monotonic() - live.admitted)
            self._stages.submit(handle, prompt, left, live.traceparent)
        except StageError as error:
            with self._lock:
                self._live.pop(handle, None)
            live.sink.push(Event(live.id, [], error=error))
            live.sink.flush({}, now=time.monotonic())
        else:
            with self._lock:  # generate may have answered already, and `turn` announced it
                announce, live.announced = not live.announced, True
            if live.cancelled:
                self._stages.cancel(handle)
            elif announce:
                # It goes with the first token, or with the next heartbeat: not worth a message of its own.
                live.sink.push(Event(live.id, [], prompt_tokens=live.prompt_tokens, pictures=live.pictures))

    def cancel(self, handle: str) -> None:
        """Stop a request; nothing more is sent of it."""
        with self._lock:
            live = self._live.pop(handle, None)
            if live:
                live.cancelled = True  # `start` may be about to submit it
        if live:
            self._stages.cancel(handle)

    def turn(self) -> list[Sink]:
        """One poll, one postprocess, one message to each listener; answers which listeners have gone."""
        poll = self._stages.poll(COALESCE_S if self._waiting else HEARTBEAT_S)
        if self._recorder:
            self._recorder.polled(poll.counters)
        claimed = self._claim(poll.rows)
        texts = self._texts(claimed) if claimed else []
        for (row, live), text in zip(claimed, texts, strict=True):
            event = self._event(row, live, text)
            if self._recorder:
                self._recorder.told(row, event)
            live.sink.push(event)
        return self._flush(poll.counters)

    def _claim(self, rows: Sequence[Row]) -> list[tuple[Row, _Live]]:
        """The rows that somebody waits for, their ids added to the window. The others are cancelled."""
        with self._lock:
            claimed = [(row, live) for row in rows if (live := self._live.get(row.id))]
            known = self._live.keys() & {row.id for row in rows}
        for row in rows:
            if row.id not in known and not row.finish_reason:  # cancelled here, or a predecessor's
                self._stages.cancel(row.id)
        for row, live in claimed:
            live.window += row.output_ids
            live.completion_tokens += len(row.output_ids)
            live.cached_tokens += row.cached_tokens
            live.logprobs += row.logprobs
        return claimed

    def _texts(self, claimed: Sequence[tuple[Row, _Live]]) -> list[Text | StageError]:
        """One postprocess call for all; its failure is everybody's."""
        windows = [
            Window(live.window, len(row.output_ids), live.sent, live.stop, bool(row.finish_reason), live.logprobs)
            for row, live in claimed
        ]
        started_ns = time.time_ns()
        texts: list[Text | StageError]
        try:
            texts = list(self._stages.postprocess(windows))
        except StageError as error:
            texts = [error] * len(windows)
        share_ns = (time.time_ns() - started_ns) // len(windows)
        for (_, live), text in zip(claimed, texts, strict=True):
            live.text_calls += 1
            live.text_busy_ns += share_ns
            live.text_first_ns = live.text_first_ns or started_ns
            if isinstance(text, Text):
                del live.window[: text.drop]
                live.sent = text.sent
                del live.logprobs[: text.told]
        return texts

    def _event(self, row: Row, live: _Live, text: Text | StageError) -> Event:
        with self._lock:
            first, live.announced = not live.announced, True
        error = text if isinstance(text, StageError) else None
        if row.finish_reason == "error":
            error = StageError(row.error, code="internal", stage="generate")
        elif row.finish_reason == "timeout":
            error = terms.time_is_up("generate")
        texts, logprobs = (text.texts, text.logprobs) if isinstance(text, Text) else ([], ())
        pictures = live.pictures if first else ()
        if not (row.finish_reason or error):
            prompt_tokens = live.prompt_tokens if first else 0
            return Event(live.id, texts, prompt_tokens=prompt_tokens, logprobs=logprobs, pictures=pictures)
        self._end(row, live)
        stopped = isinstance(text, Text) and text.stopped
        reason = "" if error else finish_reason_of(row.finish_reason, stopped)
        return Event(
            live.id,
            texts,
            reason,
            live.prompt_tokens,
            live.completion_tokens,
            {"preprocess": live.preprocess_ms, **row.stages, "postprocess": live.text_busy_ns / 1e6},
            error,
            logprobs,
            live.cached_tokens,
            pictures,
        )

    def _end(self, row: Row, live: _Live) -> None:
        """The request's last event is on its way: forget it, and have generate do so if it does not know yet."""
        with self._lock:
            self._live.pop(row.id, None)
        if not row.finish_reason:
            self._stages.cancel(row.id)
        if live.traceparent:
            ended_ns = time.time_ns()
            self._stages.trace_postprocess(
                live.traceparent, live.text_first_ns, ended_ns, live.text_calls, live.text_busy_ns
            )

    def _flush(self, counters: Mapping[str, int]) -> list[Sink]:
        now = time.monotonic()
        with self._lock:
            sinks = list(dict.fromkeys([*self._lanes, *(live.sink for live in self._live.values())]))
        self._waiting = False
        for sink in sinks:
            self._waiting |= sink.flush(counters, now=now)
        if now - self._gone_checked < _GONE_EVERY_S:
            return []
        self._gone_checked = now
        gone = [sink for sink in sinks if sink.gone()]
        for sink in gone:
            self.detach(sink)
            sink.end()
        return gone
