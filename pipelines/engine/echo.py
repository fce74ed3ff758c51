"""An engine that repeats the prompt: for benches, fault tests, and trying clients without a model.

Knows no torch and no model. Its pace is settable: a test can have a slow model, a bench one that is no cost.
What it repeats is certain, log probability 0, so temperature, top_k, top_p and min_p change nothing; a request for
what works on the scores of other tokens ends with an error.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

from pipelines.engine import Counters, Limits, Logprob, Output, Request
from pipelines.sampling import Sampling

_IMPOSSIBLE = ("response_format", "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty")


class _Stream:
    """One running request: the tokens still to come and how they end."""

    __slots__ = ("due_at", "ending", "id", "impossible", "left", "plain", "stops_at", "tokens", "top", "wants_logprobs")

    def __init__(self, request: Request, limits: Limits, due_at: float) -> None:
        prompt, sampling = request.input_ids, request.sampling
        room = max(0, limits.context - len(prompt))
        wanted = sampling.max_tokens
        self.tokens: Iterator[int]
        if wanted is None and not sampling.ignore_eos:  # once through, then the end as a model would say it
            length = max(len(prompt), sampling.min_tokens) if prompt else 0
            end = sorted(limits.eos_ids)[:1]
            self.tokens = itertools.chain(itertools.islice(itertools.cycle(prompt), length), end)
            length += len(end)
            self.left, self.ending = min(length, room), "stop" if length <= room else "length"
        else:
            self.tokens = itertools.cycle(prompt)
            self.left, self.ending = min(room if wanted is None else wanted, room) if prompt else 0, "length"
        self.id = request.id
        self.stops_at = request.stops_at
        self.wants_logprobs, self.top = sampling.logprobs, min(1, sampling.top_logprobs)
        self.impossible = _impossible(sampling)
        self.plain = not (self.stops_at or self.wants_logprobs or self.impossible)
        self.due_at = due_at

    def take(self, count: int) -> Output:
        """The next `count` tokens, or as many as there are before an end."""
        if not self.plain:
            return self._watched(count)
        token_ids = list(itertools.islice(self.tokens, count if count < self.left else self.left))
        self.left -= len(token_ids)
        return Output(self.id, token_ids, "" if self.left else self.ending)

    def _watched(self, count: int) -> Output:
        output = Output(self.id)
        if self.impossible:
            output.finish_reason, output.error = "error", self.impossible
            return output
        for token_id in itertools.islice(self.tokens, min(count, self.left)):
            output.token_ids.append(token_id)
            if self.wants_logprobs:
                output.logprobs.append(Logprob(token_id, 0.0, [(token_id, 0.0)] * self.top))
            self.left -= 1
            try:
                if self.stops_at is not None and self.stops_at(token_id):
                    output.finish_reason = "stop"
                    return output
            except Exception as error:  # the end of this request, not of the engine
                output.finish_reason, output.error = "error", f"{type(error).__name__}: {error}"
                return output
        output.finish_reason = "" if self.left else self.ending
        return output


def _impossible(sampling: Sampling) -> str:
    for name in _IMPOSSIBLE:
        if getattr(sampling, name) != getattr(_DEFAULTS, name):
            return f"'{name}' cannot be applied: the echo engine repeats the prompt and has no scores. Leave it out."
    return ""


_DEFAULTS = Sampling()


class EchoEngine:
    """Repeats the prompt once, or until max_tokens.

    `tokens_per_s` is per stream and may be changed at any time; 0 is no pace: every step gives every running
    request one token. With a pace it does so too, so many times a second, as an engine does whose steps take that
    long: whoever comes meanwhile takes part in the next one.
    """

    can_park = True  # it has nothing to let go of

    def __init__(
        self,
        limits: Limits,
        *,
        tokens_per_s: float = 0,
        max_running: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.tokens_per_s = tokens_per_s
        self.max_running = max_running
        self.counters = Counters()
        self.begun: Sequence[str] = ()
        self._clock = clock
        self._waiting: list[tuple[int, int, Request]] = []  # a heap: by priority, then as they came
        self._numbers = itertools.count()
        self._running: list[_Stream] = []
        self._cancelled: set[str] = set()
        self._deadlines: dict[str, float] = {}
        self._in_flight: set[str] = set()

    def submit(self, request: Request) -> None:
        if request.id in self._in_flight:
            raise ValueError(f"a request {request.id!r} is in flight already")
        self._in_flight.add(request.id)
        if request.deadline is not None:
            self._deadlines[request.id] = request.deadline
        heapq.heappush(self._waiting, (request.priority, next(self._numbers), request))
        self.counters.waiting += 1

    def cancel(self, request_id: str) -> None:
        if request_id in self._in_flight:
            self._cancelled.add(request_id)

    def park(self) -> None: ...

    def wake(self) -> None: ...

    @property
    def busy(self) -> bool:
        return bool(self._in_flight)

    @property
    def idle_s(self) -> float:
        """Until the next token is due; a cancel or a request to admit is due at once."""
        if not self.tokens_per_s or not self._running or self._cancelled:
            return 0.0
        if self._waiting and len(self._running) < self.max_running:
            return 0.0
        return max(0.0, min([self._running[0].due_at, *self._deadlines.values()]) - self._clock())

    def step(self) -> list[Output]:
        """Admit, then one token for each running request, or with a pace all that are due by now."""
        began_ns = time.perf_counter_ns()
        outputs = self._leave() if self._cancelled or self._deadlines else []
        now = self._clock()
        if self._waiting:
            self._admit(now)
        given = self._paced(now) if self.tokens_per_s else [stream.take(1) for stream in self._running]
        if given:
            self.counters.steps += 1
            self.counters.output_tokens += sum([len(output.token_ids) for output in given])
            self._retire({output.id for output in given if output.finish_reason})
            self.counters.step_rows += len(given)
            self.counters.step_ns += time.perf_counter_ns() - began_ns
        return outputs + given if outputs else given

    def _paced(self, now: float) -> list[Output]:
        """What is due by now; after a delay that is several tokens at once."""
        given = []
        for stream in self._running:
            if count := self._due(stream, now):
                stream.due_at += count / self.tokens_per_s
                given.append(stream.take(count))
        return given

    def _due(self, stream: _Stream, now: float) -> int:
        return int((now - stream.due_at) * self.tokens_per_s) + 1 if stream.due_at <= now else 0

    def _admit(self, now: float) -> None:
        due_at = now
        if self._running and self.tokens_per_s:
            first = self._running[0]
            due_at = first.due_at + self._due(first, now) / self.tokens_per_s
        while self._waiting and len(self._running) < self.max_running:
            _, _, request = heapq.heappop(self._waiting)
            self._running.append(_Stream(request, self.limits, due_at))
            self.counters.prompt_tokens += len(request.input_ids)
        self._count()

    def _retire(self, ended: set[str]) -> None:
        if ended:
            self.counters.finished += len(ended)
            self._running = [stream for stream in self._running if stream.id not in ended]
            self._forget(ended)

    def _leave(self) -> list[Output]:
        """Those that are cancelled or too late."""
        gone, self._cancelled, now = self._cancelled, set(), self._clock()
        late = {request_id for request_id, deadline in self._deadlines.items() if deadline <= now} - gone
        if not gone and not late:
            return []
        self._running = [stream for stream in self._running if stream.id not in gone | late]
        self._waiting = [place for place in self._waiting if place[2].id not in gone | late]
        heapq.heapify(self._waiting)
        self.counters.cancelled += len(gone)
        self.counters.finished += len(late)
        self._forget(gone | late)
        ends = [(gone, "cancelled"), (late, "timeout")]
        return [Output(request_id, [], reason) for ids, reason in ends for request_id in sorted(ids)]

    def _forget(self, ended: set[str]) -> None:
        self._in_flight -= ended
        for request_id in ended & self._deadlines.keys():
            del self._deadlines[request_id]
        self._count()

    def _count(self) -> None:
        self.counters.running, self.counters.waiting = len(self._running), len(self._waiting)
