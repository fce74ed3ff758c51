"""The engine's interface: requests in, tokens out, one step at a time.

An engine knows no Triton, no text and no clock but the one it is given. It is driven by one thread, which calls
`submit`, `cancel` and `step`; `pipelines.generate` owns that thread. Ten lines drive one by hand:

    engine = EchoEngine(Limits(context=8192, eos_ids=frozenset({2})))
    engine.submit(Request("a", [5, 6, 7], Sampling(max_tokens=3)))
    while engine.busy:
        for output in engine.step():
            print(output)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipelines.sampling import Sampling


@dataclass(frozen=True)
class Limits:
    """What the model allows: its context in tokens (prompt and answer together) and the ids that end an answer."""

    context: int
    eos_ids: frozenset[int]


@dataclass
class Request:
    """One prompt to continue. `stops_at` is told each new token and answers whether a stop string is now complete."""

    id: str
    input_ids: Sequence[int]
    sampling: Sampling
    stops_at: Callable[[int], bool] | None = None


@dataclass(frozen=True)
class Output:
    """What one step produced for one request. The last one carries `finish_reason`: stop, length, cancelled or error.

    The end-of-sequence token is part of `token_ids` (it was generated, and usage counts it); the token that
    """

    id: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""


@dataclass
class Counters:
    """The engine's own counts, since it started; `running` and `waiting` are as of now."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0
    cancelled: int = 0


class Engine(Protocol):
    """Continuous batching behind four calls. `step` runs one pass over all running requests: admit, forward, sample, emit."""

    counters: Counters

    def submit(self, request: Request) -> None: ...

    def cancel(self, request_id: str) -> None:
        """Stop a request. Its last output, with finish_reason `cancelled`, comes from the next step; unknown ids are ignored."""

    def step(self) -> list[Output]: ...

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
