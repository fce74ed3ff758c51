"""The generate stage: one thread drives an engine, one thread answers. Knows no Triton: answers are callbacks.

Two ways to be served. `generate` answers once, with the whole answer (the ensemble). `submit` puts a request's
tokens into the mailbox, which `poll` empties: everything produced since the last poll, for all requests (DESIGN §3).
The engine never waits for whoever reads: a slow reader finds more in its mailbox, the sender thread does the sending.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from observability import tracing
from pipelines import footprint, terms
from pipelines.engine import Constraint, Engine, Logprob, Output, Request
from pipelines.errors import StageError
from pipelines.sampling import Sampling
from pipelines.structure import Structure
from pipelines.terms import Terms

if TYPE_CHECKING:
    from pipelines.images.features import Features
    from pipelines.images.gate import Gate

log = logging.getLogger(__name__)

# What a poll carries at most, shared by its requests; the rest waits for the next poll, a millisecond later. It
# bounds a message, and with it the time a request waits behind others, when an engine outruns its reader by far.
MAX_POLL_TOKENS = 4096
MIN_ROW_TOKENS = 16

_CHANGES = ("park", "wake")  # what is asked of the engine and answered when it is done

MOST_MATES = 8  # that a trace names
GAP_BINS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(frozen=True)
class Answer:
    """A whole answer: what `generate` is answered with."""

    output_ids: list[int]
    finish_reason: str


class Row(NamedTuple):
    """One request's share of a poll. `stages` (ms) comes with `finish_reason`, in the last.

    `cached_tokens` comes with the first token. `logprobs` has an entry a token where they are asked for.
    """

    id: str
    output_ids: list[int]
    finish_reason: str = ""
    error: str = ""
    stages: Mapping[str, float] = MappingProxyType({})
    cached_tokens: int = 0
    logprobs: Sequence[Logprob] = ()


@dataclass(frozen=True)
class Poll:
    rows: list[Row]
    counters: dict[str, int]


@dataclass(frozen=True)
class State:
    """What becomes of the process while nobody is served. Bytes are what it holds and no other process does."""

    state: str  # ready, or parked: the engine has let go of its weights
    phases_s: Mapping[str, float]  # of its load (`pipelines.phases`)
    ram_bytes: int
    gpu_bytes: int
    can_park: bool
    parked_ram_bytes: int | None  # when it was parked last


@dataclass
class _Work:
    """A request between its submission and its last token. What it brought is the engine's: pictures are large."""

    prompt_tokens: int
    name: str  # what cancel calls it
    traceparent: str | None
    answer: Callable[[Answer | StageError], None] | None  # None: the mailbox
    arrived_ns: int
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    cached_tokens: int = 0
    untold_cached: int = 0
    finish_reason: str = ""
    error: str = ""
    prefill_ns: int = 0
    first_ns: int = 0
    last_ns: int = 0
    produced: int = 0
    gaps: list[int] = field(default_factory=lambda: [0] * (len(GAP_BINS_MS) + 1))
    room: ExitStack = field(default_factory=ExitStack)  # for its pictures; closed when it has ended
    batch: int = 0  # requests that ran when it had its first token
    mates: list[str] = field(default_factory=list)  # traceparents of some of them

    def stages(self) -> dict[str, float]:
        prefill, first = self.prefill_ns or self.last_ns, self.first_ns or self.last_ns
        return {
            "queue": (prefill - self.arrived_ns) / 1e6,
            "prefill": (first - prefill) / 1e6,
            "decode": (self.last_ns - first) / 1e6,
        }

    def take(self, share: int) -> Row:
        """What a poll is told of it: at most so many tokens, the oldest, and its end once none is left."""
        ids, self.output_ids = self.output_ids[:share], self.output_ids[share:]
        logprobs: Sequence[Logprob] = ()
        if self.logprobs:
            logprobs, self.logprobs = self.logprobs[:share], self.logprobs[share:]
        cached, self.untold_cached = self.untold_cached, 0
        if self.finish_reason and not self.output_ids:
            return Row(self.name, ids, self.finish_reason, self.error, self.stages(), cached, logprobs)
        return Row(self.name, ids, cached_tokens=cached, logprobs=logprobs)


class Generate:
    """Owns an engine and its two threads. Every method may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        *,
        stop_checker: Callable[[tuple[str, ...]], Callable[[int], bool]],
        constraint: Callable[[Structure], Constraint] | None = None,
        now_ns: Callable[[], int] = time.time_ns,
        room: Gate | None = None,
        phases_s: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """`room` is for the pictures of all requests that have not ended: who brings some waits for it.

        `phases_s` is how long its load took, which it says when it is asked for its state.
        """
        self._engine = engine
        self._room = room
        self._stop_checker = stop_checker
        self._constraint = constraint
        self._phases_s = dict(phases_s)
        self._parked = False
        self._parks = 0  # that were asked for and are not done
        self._unanswered = 0  # parks and wakes: the sender ends after them
        self._parked_ram_bytes: int | None = None
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._work_to_do = threading.Condition(self._lock)
        self._answers_to_send = threading.Condition(self._lock)
        self._commands: deque[tuple[str, Any]] = deque()
        self._works: dict[str, _Work] = {}
        self._mailbox: dict[str, _Work] = {}
        self._answers: deque[Callable[[], None]] = deque()
        self._poll: tuple[float, Callable[[Poll], None]] | None = None
        self._numbers = itertools.count()
        self._closing = False
        # A thread that wants to answer waits at most this long for a busy engine thread (the default is 5 ms; at one
        # stream of a free-running echo the first token took 7.3 ms with 0.5 ms here, 6.3 with 0.1).
        sys.setswitchinterval(0.0001)
        self._threads = [
            threading.Thread(target=self._drive, name="engine", daemon=True),
            threading.Thread(target=self._send, name="sender", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def generate(
        self,
        input_ids: list[int],
        sampling: Sampling,
        answer: Callable[[Answer | StageError], None],
        *,
        name: str = "",
        asked: Terms = terms.DEFAULT,
        traceparent: str | None = None,
        features: Features | None = None,
    ) -> None:
        """Continue `input_ids`; `answer` is called once, from the sender thread, when all is generated."""
        if sampling.logprobs:
            raise StageError(
                "'logprobs' are no output of the ensemble: ask the orchestrator, or the gateway.",
                code="unsupported_parameter",
                param="logprobs",
                stage="generate",
            )
        self._enqueue(input_ids, sampling, f"unary-{next(self._numbers)}", name, asked, traceparent, answer, features)

    def submit(
        self,
        id: str,
        input_ids: list[int],
        sampling: Sampling,
        *,
        asked: Terms = terms.DEFAULT,
        traceparent: str | None = None,
        features: Features | None = None,
    ) -> None:
        """Continue `input_ids`, into the mailbox."""
        if id in self._works:
            raise StageError(f"request {id!r} is running already", code="internal", stage="generate")
        self._enqueue(input_ids, sampling, id, id, asked, traceparent, None, features)

    def cancel(self, name: str) -> int:
        """Stop every request of this name; answers how many there were."""
        with self._lock:
            ids = [id for id, work in self._works.items() if work.name == name]
            self._commands.extend(("cancel", id) for id in ids)
            if name in self._mailbox:  # nobody wants what is left of it
                self._mailbox[name].output_ids.clear()
                self._mailbox[name].logprobs.clear()
            self._work_to_do.notify()
        return len(ids)

    def poll(self, wait_s: float, answer: Callable[[Poll], None]) -> None:
        """Answer with all that is in the mailbox, once there is something, or empty after `wait_s`."""
        with self._lock:
            if self._poll:  # its caller is gone, or there would not be a second one
                self._answers.append(lambda answer=self._poll[1]: answer(Poll([], {})))  # type: ignore[misc]
            self._poll = (time.monotonic() + wait_s, answer)
            self._answers_to_send.notify()

    def counters(self) -> dict[str, int]:
        return asdict(self._engine.counters)

    def state(self) -> State:
        return State(
            "parked" if self._parked else "ready",
            self._phases_s,
            footprint.ram_bytes(),
            footprint.gpu_bytes(),
            self._engine.can_park,
            self._parked_ram_bytes,
        )

    def park(self, answer: Callable[[float | StageError], None]) -> None:
        """Let go of the weights; `answer` is told the seconds it took, or why it is ready as before."""
        if not self._engine.can_park:
            raise StageError("This pipeline's engine cannot be parked: unload it.", stage="generate")
        with self._lock:
            if self._works:
                raise StageError(
                    f"{len(self._works)} requests run: park when they have ended.", code="unavailable", stage="generate"
                )
            self._command("park", answer)
            self._parks += 1

    def wake(self, answer: Callable[[float | StageError], None]) -> None:
        """Take the weights back; `answer` is told the seconds it took, or why it is parked as before."""
        with self._lock:
            self._command("wake", answer)

    def close(self) -> None:
        """Stop both threads; whoever still waits is told."""
        with self._lock:
            self._closing = True
            self._work_to_do.notify()
            self._answers_to_send.notify()
        for thread in self._threads:
            thread.join(timeout=10)

    def _enqueue(
        self,
        input_ids: list[int],
        sampling: Sampling,
        id: str,
        name: str,
        asked: Terms,
        traceparent: str | None,
        answer: Callable[[Answer | StageError], None] | None,
        features: Features | None,
    ) -> None:
        stops_at = self._stop_checker(sampling.stop) if sampling.stop else None
        structure = sampling.response_format
        constraint = self._constraint(structure) if structure and self._constraint else None
        deadline = None if asked.timeout_ms is None else time.monotonic() + asked.timeout_ms / 1000
        arrays, identity = (features.arrays, features.identity) if features else (None, None)
        request = Request(id, input_ids, sampling, stops_at, constraint, asked.priority, deadline, arrays, identity)
        arrived_ns = self._now_ns()
        with ExitStack() as room:
            if features and self._room:
                patience_s = None if deadline is None else deadline - time.monotonic()
                size = sum(array.nbytes for array in features.arrays.values())
                room.enter_context(self._room.of(size, timeout=patience_s))
            work = _Work(len(input_ids), name, traceparent, answer, arrived_ns, room=room.pop_all())
        with self._lock:
            if refusal := self._refusal():
                work.room.close()
                raise refusal
            self._works[id] = work
            self._commands.append(("submit", request))
            self._work_to_do.notify()

    def _refusal(self) -> StageError | None:
        """Under the lock: why no request is taken now."""
        if self._closing:
            return StageError("generate is shutting down", code="unavailable", stage="generate")
        if self._parked or self._parks:
            return StageError("This pipeline is parked: wake it first.", code="unavailable", stage="generate")
        return None

    def _command(self, verb: str, answer: Callable[[float | StageError], None]) -> None:
        """Under the lock: to the engine thread."""
        if self._closing:
            raise StageError("generate is shutting down", code="unavailable", stage="generate")
        self._commands.append((verb, answer))
        self._unanswered += 1
        self._work_to_do.notify()

    def _drive(self) -> None:
        """The engine thread: commands in, one step, outputs out."""
        while True:
            with self._lock:
                while not (self._commands or self._engine.busy or self._closing):
                    self._work_to_do.wait()
                if self._closing:
                    return
                commands, self._commands = self._commands, deque()
            try:
                while commands:  # left here, the last request's pictures would stay until the next one comes
                    self._obey(*commands.popleft())
                if not self._engine.busy:
                    continue
                started_ns = self._now_ns()
                outputs = self._engine.step()
            except Exception as error:  # the engine is broken: every request on it is told, and the next may try
                outputs = [Output(id, [], "error", f"{type(error).__name__}: {error}") for id in list(self._works)]
                for id in list(self._works):
                    self._engine.cancel(id)
            with self._lock:
                for id in self._engine.begun:
                    if (work := self._works.get(id)) and not work.prefill_ns:
                        work.prefill_ns = started_ns
                if outputs:
                    self._deliver(outputs, started_ns)
                elif (idle_s := self._engine.idle_s) > 0 and not self._commands:
                    self._work_to_do.wait(idle_s)

    def _obey(self, verb: str, argument: Any) -> None:
        if verb in _CHANGES:
            self._change(verb == "park", argument)
        else:
            getattr(self._engine, verb)(argument)

    def _change(self, park: bool, answer: Callable[[float | StageError], None]) -> None:
        """Ready to parked, or back. What is so already is done at once."""
        started, changed, said = time.monotonic(), self._parked, None
        try:
            if park and not self._parked:
                self._engine.park()
                footprint.trim()
            elif not park and self._parked:
                self._engine.wake()
            changed = park
        except Exception as error:
            verb = "parked" if park else "woken"
            said = StageError(f"It cannot be {verb}: {error}", code="unavailable", stage="generate")
            log.error("not %s", verb, exc_info=error)
        took_s = time.monotonic() - started
        with self._lock:
            self._parked, self._parks = changed, self._parks - park
            if changed:
                self._parked_ram_bytes = footprint.ram_bytes()
            self._unanswered -= 1
            self._answers.append(lambda: answer(said or took_s))
            self._answers_to_send.notify()

    def _deliver(self, outputs: list[Output], started_ns: int) -> None:
        """Under the lock: what a step produced goes to each request's work, and that to its reader."""
        now_ns = self._now_ns()
        for output in outputs:
            work = self._works.get(output.id)
            if work is None:
                continue
            if output.token_ids:
                if not work.first_ns:
                    work.prefill_ns, work.first_ns = work.prefill_ns or started_ns, now_ns
                    if work.traceparent:
                        _note_mates(work, self._works.values(), self._engine.counters.running)
                elif work.traceparent:
                    work.gaps[bisect_left(GAP_BINS_MS, (now_ns - work.last_ns) / 1e6)] += 1
                work.produced += len(output.token_ids)
                work.output_ids += output.token_ids
                work.logprobs += output.logprobs
            if output.cached_tokens:
                work.cached_tokens = work.untold_cached = output.cached_tokens
            work.last_ns = now_ns
            if output.finish_reason:
                work.finish_reason, work.error = output.finish_reason, output.error
                work.room.close()
                del self._works[output.id]
            if work.answer is None:
                self._mailbox[output.id] = work
            elif work.finish_reason:
                self._answers.append(lambda work=work: self._answer(work))  # type: ignore[misc]
        self._answers_to_send.notify()

    def _send(self) -> None:
        """The sender thread: whole answers, then the outstanding poll."""
        while True:
            with self._lock:
                while not self._answers and not (poll := self._take_poll()):
                    if self._closing:
                        self._tell_the_waiting()
                        if self._answers or not self._unanswered:
                            break
                    deadline = self._poll[0] if self._poll else None
                    self._answers_to_send.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
                answers, self._answers = self._answers, deque()
                if answers:
                    poll = None
                closing = self._closing and not (answers or poll or self._unanswered)
            for answer in answers:
                answer()
            if poll:
                poll()
            if closing:
                return

    def _take_poll(self) -> Callable[[], None] | None:
        """Under the lock: the outstanding poll's answer, if it is due."""
        if not self._poll or not (self._mailbox or self._closing or self._poll[0] <= time.monotonic()):
            return None
        _, answer = self._poll
        self._poll = None
        works, self._mailbox = self._mailbox, {}
        share = max(MIN_ROW_TOKENS, MAX_POLL_TOKENS // max(1, len(works)))
        rows, finished = [], []
        for id, work in works.items():
            rows.append(work.take(share))
            if work.output_ids:
                self._mailbox[id] = work
            elif work.finish_reason:
                finished.append(work)
        message = Poll(rows, asdict(self._engine.counters))

        def send() -> None:
            answer(message)
            for work in finished:
                _trace(work)

        return send

    def _answer(self, work: _Work) -> None:
        assert work.answer is not None
        if work.finish_reason == "error":
            work.answer(StageError(work.error, code="internal", stage="generate"))
        elif work.finish_reason == "timeout":
            work.answer(terms.time_is_up("generate"))
        else:
            work.answer(Answer(work.output_ids, work.finish_reason))
        _trace(work)

    def _tell_the_waiting(self) -> None:
        """Under the lock, at the end: nobody is left without an answer."""
        stopped = StageError("generate was stopped", code="unavailable", stage="generate")
        for work in self._works.values():
            work.room.close()
            if work.answer:
                self._answers.append(lambda work=work: work.answer(stopped))  # type: ignore[misc]
        self._works.clear()
        commands, self._commands = self._commands, deque()
        for verb, argument in commands:
            if verb in _CHANGES:
                self._unanswered -= 1
                self._answers.append(lambda answer=argument: answer(stopped))  # type: ignore[misc]


def _note_mates(work: _Work, others: Iterable[_Work], running: int) -> None:
    """Who ran when it had its first token: how many, and some of them, whom its trace names. Once a request."""
    work.batch = running
    for mate in itertools.islice(others, 4 * MOST_MATES):
        if mate.first_ns and mate.traceparent and mate.traceparent != work.traceparent:
            work.mates.append(mate.traceparent)
    del work.mates[MOST_MATES:]


def _trace(work: _Work) -> None:
    """The stage's spans, recorded once the times are known: never a span per token (DESIGN §6)."""
    if not work.traceparent:
        return
    prefill_ns, first_ns = work.prefill_ns or work.last_ns, work.first_ns or work.last_ns
    attributes = {
        "triptych.finish_reason": work.finish_reason,
        "gen_ai.usage.input_tokens": work.prompt_tokens,
        "gen_ai.usage.output_tokens": work.produced,
        "gen_ai.usage.cache_read.input_tokens": work.cached_tokens,
        "triptych.batch.size": work.batch or None,
    }
    span = tracing.start("generate", parent=work.traceparent, attributes=attributes, start_ns=work.arrived_ns)
    if work.finish_reason == "error":
        span.error("internal", work.error)
    elif work.finish_reason == "timeout":
        span.error("timeout")
    for mate in work.mates:
        span.link(mate)
    tracing.record("queue", span, work.arrived_ns, prefill_ns)
    if work.first_ns:
        tracing.record("prefill", span, prefill_ns, first_ns, {"gen_ai.usage.input_tokens": work.prompt_tokens})
        gaps = {"triptych.gap_ms.bounds": list(GAP_BINS_MS), "triptych.gap_ms.counts": work.gaps}
        tracing.record("decode", span, first_ns, work.last_ns, gaps)
    elif work.prefill_ns:
        tracing.record("prefill", span, prefill_ns, work.last_ns)
    span.end(work.last_ns)
