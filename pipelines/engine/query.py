"""An engine around a model that is asked in text: one question at a time, on a thread of its own.

The ids of a prompt are a question's spelling (`pipelines.spelling`), the ids it gives are the answer's: what the model
streams, spelt again, so usage and `max_tokens` count these. Its only feature is the picture. Between two pieces of an
answer it can be stopped; while the model looks at a picture it cannot, and the next question waits. Knows neither torch
nor how a model is asked: `engine.remote` does.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.engine import Counters, Limits, Output, Request
from pipelines.errors import StageError
from pipelines.sampling import Sampling
from pipelines.spelling import Spelled, Spelling

log = logging.getLogger(__name__)

_PICTURE = "picture"
_TICK_S = 0.002  # how often the driver looks for what the model has said
_DEFAULTS = Sampling()
_UNSUPPORTED = (
    *("response_format", "logprobs", "top_logprobs", "logit_bias", "top_k", "min_p", "min_tokens", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


@dataclass(frozen=True)
class Question:
    text: str
    picture: Image.Image | None
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None


Ask = Callable[[Question], Iterator[str]]


def check_sampling(sampling: Sampling) -> None:
    """Raises StageError for what a model that gives text alone cannot be told."""
    for name in _UNSUPPORTED:
        if getattr(sampling, name) != getattr(_DEFAULTS, name):
            raise StageError(
                f"'{name}' is not supported by this model: its own code makes the text. Leave it out.",
                code="unsupported_parameter",
                param=name,
            )


def load_query_engine(
    home: Path, limits: Limits, *, trust_remote_code: bool, dtype: str = "auto", device: str = "cpu"
) -> QueryEngine:
    """A ValueError says why the folder's code is not run, or cannot be."""
    # torch takes seconds to import
    from pipelines.engine.remote import asking, load_remote

    spelling = Spelling.load(home)
    model = load_remote(home, trust_remote_code=trust_remote_code, dtype=dtype, device=device)
    return QueryEngine(asking(model, home), spelling, limits)


class _Job:
    """One request, from its submission to its last output. `left`: nobody waits for it any more."""

    def __init__(self, request: Request, most: int, asked: int) -> None:
        self.request = request
        self.most = most  # tokens
        self.asked = asked  # of the model
        self.produced = 0
        self.left = False


class QueryEngine:
    """Requests wait by priority, then as they came. The thread that drives it and the one that asks share a lock."""

    can_park = False  # what its code keeps beside the weights nobody knows

    def __init__(
        self, ask: Ask, spelling: Spelling, limits: Limits, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self.counters = Counters()
        self.begun: Sequence[str] = ()
        self._ask = ask
        self._spelling = spelling
        self._clock = clock
        self._lock = threading.Condition()
        self._waiting: list[tuple[int, int, _Job]] = []  # a heap
        self._numbers = itertools.count()
        self._jobs: dict[str, _Job] = {}
        self._running: _Job | None = None
        self._cancelled: set[str] = set()
        self._arrived: dict[str, Output] = {}
        threading.Thread(target=self._work, name="query", daemon=True).start()

    def submit(self, request: Request) -> None:
        if request.id in self._jobs:
            raise ValueError(f"a request {request.id!r} is in flight already")
        room = max(0, self.limits.context - len(request.input_ids))
        wanted = request.sampling.max_tokens
        most = room if wanted is None else min(wanted, room)
        # The model counts its own way, and does not say that it was cut: so that we see it, it may say a little more.
        job = _Job(request, most, min(most + most // 4 + 8, room))
        with self._lock:
            self._jobs[request.id] = job
            heapq.heappush(self._waiting, (request.priority, next(self._numbers), job))
            self._count()
            self._lock.notify()

    def cancel(self, request_id: str) -> None:
        if request_id in self._jobs:
            self._cancelled.add(request_id)

    def park(self) -> None:
        raise OSError("a model that its own code runs cannot be parked")

    def wake(self) -> None: ...

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    @property
    def idle_s(self) -> float:
        """Until it is worth looking again; a cancel, or what the model has said, is due at once."""
        if self._cancelled or self._arrived:
            return 0.0
        return _TICK_S

    def step(self) -> list[Output]:
        """What has come since the last. It does not wait for the model."""
        with self._lock:
            ended = self._leave() if self._cancelled or self._jobs else []
            given, self._arrived = list(self._arrived.values()), {}
            if given:
                self.counters.steps += 1
            for output in given:
                self.counters.output_tokens += len(output.token_ids)
                if output.finish_reason:
                    self.counters.finished += 1
                    self._jobs.pop(output.id).left = True
            self._count()
        return ended + given

    def _leave(self) -> list[Output]:
        """Those that are cancelled or too late; what they said since the last step is theirs no more."""
        gone, self._cancelled, now = self._cancelled, set(), self._clock()
        deadlines = ((name, job.request.deadline) for name, job in self._jobs.items())
        late = {name for name, deadline in deadlines if deadline is not None and deadline <= now} - gone
        for name in gone | late:
            self._jobs.pop(name).left = True
            self._arrived.pop(name, None)
        if gone or late:
            self._waiting = [place for place in self._waiting if not place[2].left]
            heapq.heapify(self._waiting)
        self.counters.cancelled += len(gone)
        self.counters.finished += len(late)
        ends = [(gone, "cancelled"), (late, "timeout")]
        return [Output(name, [], reason) for names, reason in ends for name in sorted(names)]

    def _count(self) -> None:
        self.counters.running = int(self._running is not None and not self._running.left)
        self.counters.waiting = len(self._waiting)

    def _work(self) -> None:
        """The thread that asks."""
        while True:
            with self._lock:
                self._running = None
                self._count()
                while not self._waiting:
                    self._lock.wait()
                _, _, job = heapq.heappop(self._waiting)
                self._running = job
                self.counters.prompt_tokens += len(job.request.input_ids)
                self._count()
            try:
                self._say(job, [], self._answer(job))
            except BaseException as error:  # another's code: the end of this request, and never of the engine
                log.warning("the model's code failed", exc_info=error)
                self._say(job, [], "error", f"{type(error).__name__}: {error}")

    def _answer(self, job: _Job) -> str:
        """Says all that the model says, and returns why it ended."""
        check_sampling(job.request.sampling)
        if not job.most:
            return "length"
        pieces = self._pieces(job)
        try:
            spelled = Spelled(self._spelling)
            for piece in pieces:
                if job.left:
                    return "cancelled"
                if ended := self._take(job, spelled.push(piece)):
                    return ended
            return self._take(job, spelled.finish()) or "stop"
        finally:
            _close(pieces)

    def _pieces(self, job: _Job) -> Iterator[str]:
        request, sampling = job.request, job.request.sampling
        pixels = (request.features or {}).get(_PICTURE)
        return self._ask(
            Question(
                text=self._spelling.text(request.input_ids),
                picture=None if pixels is None else Image.fromarray(np.ascontiguousarray(pixels)),
                max_tokens=job.asked,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
            )
        )

    def _take(self, job: _Job, ids: list[int]) -> str:
        """Says these, as far as the answer goes; why it ends, if it does."""
        stops_at, ended = job.request.stops_at, ""
        for place, token_id in enumerate(ids, 1):
            job.produced += 1
            if stops_at is not None and stops_at(token_id):
                ended = "stop"
            elif job.produced == job.most:
                ended = "length"
            if ended:
                ids = ids[:place]
                break
        self._say(job, ids)
        return ended

    def _say(self, job: _Job, ids: list[int], finish_reason: str = "", error: str = "") -> None:
        with self._lock:
            if job.left or not (ids or finish_reason):
                return
            output = self._arrived.setdefault(job.request.id, Output(job.request.id))
            output.token_ids += ids
            output.finish_reason, output.error = finish_reason, error


def _close(pieces: Iterator[str]) -> None:
    """Ends a generator where it stands. Its own clean-up may fail, and nobody waits for that."""
    try:
        getattr(pieces, "close", lambda: None)()
    except Exception as error:
        log.warning("the model's code failed as it was stopped", exc_info=error)
