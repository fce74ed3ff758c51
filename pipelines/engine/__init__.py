"""The engine's interface: requests in, tokens out, one step at a time.

An engine knows no Triton, no text and no clock but the one it is given. It is driven by one thread, which
calls `submit`, `cancel`, `step`, `park` and `wake`; `pipelines.generate` owns that thread. Ten lines drive one by hand:

    engine = EchoEngine(Limits(context=8192, eos_ids=frozenset({2})))
    engine.submit(Request("a", [5, 6, 7], Sampling(max_tokens=3)))
    while engine.busy:
        for output in engine.step():
            print(output)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from pipelines.sampling import Sampling

Bits: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"
Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True)
class Limits:
    """What the model allows: its context in tokens (prompt and answer together), and the end ids."""

    context: int
    eos_ids: frozenset[int]


class Constraint(Protocol):
    """What a structured answer may continue with: a grammar's state, one for each request."""

    def mask(self) -> Bits:
        """Which tokens may come next: one bit a token, the lowest bit of a word first. May take its time."""

    def accept(self, token_id: int) -> None:
        """The token that was taken; the next mask may be computed from now on, beside the forward."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow: the answer ends here even where the model has not said so."""


@dataclass
class Request:
    """One prompt to continue. `stops_at` is told each new token, says whether a stop string is complete.

    Of those that wait the lowest `priority` is first. At `deadline`, on the engine's clock, it ends with `timeout`.
    `features` are what the model takes besides ids: its pictures, by the names that it has for them. `identity` is one
    number a token of the prompt, by which beginnings are compared: the ids say nothing of what is in a picture.
    """

    id: str
    input_ids: Sequence[int]
    sampling: Sampling
    stops_at: Callable[[int], bool] | None = None
    constraint: Constraint | None = None
    priority: int = 0
    deadline: float | None = None
    features: Mapping[str, Array] | None = None
    identity: Sequence[int] | None = None


class Logprob(NamedTuple):
    """A token's log probability, as the model has it before temperature and penalties, and the likeliest there."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True)
class Output:
    """What one step produced for one request. The last has a `finish_reason`: stop, length, cancelled, timeout, error.

    The end-of-sequence token is part of `token_ids` (it was generated, and usage counts it), and so is the
    token that completes a stop string. `logprobs` has an entry a token where they are asked for. `cached_tokens`,
    in a request's first output, is how much of the prompt was not computed again.
    Not frozen, though nobody changes one: a frozen one is slow to make.
    """

    id: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""
    logprobs: list[Logprob] = field(default_factory=list)
    cached_tokens: int = 0


@dataclass
class Counters:
    """The engine's own counts, since it started; `running` and `waiting` are as of now.

    Every request ends in exactly one of `finished` (stop, length or error) and `cancelled`. `prompt_tokens`
    counts the prompts that were admitted, `cached_tokens` what of them was not computed again, `preempted` how often
    a running request had to wait again; `steps` the passes that produced something, `step_ns` the time in them and
    `step_rows` the rows in them, both 0 where the model's own code makes the steps; `compiled_steps` are those that
    compiled code made, which rounds otherwise than the model's own.
    """

    running: int = 0
    waiting: int = 0
    steps: int = 0
    step_ns: int = 0
    step_rows: int = 0
    compiled_steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    preempted: int = 0


class Engine(Protocol):
    """Continuous batching behind four calls. A `step` is: admit, forward, sample, emit, for all that run.

    While nothing is in flight it can let go of its weights, and of all that it computed: `park`, until `wake`. Where
    either fails it is as it was.
    """

    counters: Counters
    can_park: bool
    begun: Sequence[str]  # those whose prompts the last step took in without giving a token yet: long ones take several

    def submit(self, request: Request) -> None:
        """Queue a request. Its id must not be that of one in flight: that is a ValueError."""

    def cancel(self, request_id: str) -> None:
        """Stop a request: the next step gives its last output, `cancelled`. An unknown id is ignored."""

    def step(self) -> list[Output]:
        """What one pass produced, at most one output for each request."""

    def park(self) -> None:
        """Let go of them. Nothing may be submitted then."""

    def wake(self) -> None:
        """Take them back: what it answers is what it would have answered."""

    @property
    def busy(self) -> bool:
        """Whether there are requests whose last output has not been given yet."""

    @property
    def idle_s(self) -> float:
        """Seconds until a step would produce something; the driver waits that long. 0 if it has no pace."""
