"""What the gateway asks of whatever runs the pipelines: submit a request, get its deltas, cancel it.

Knows no HTTP and no Triton. `gateway.lane` implements it over gRPC; tests script it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

from pipelines import terms
from pipelines.logprobs import Entry
from pipelines.pipeline import Pipeline
from pipelines.terms import Terms

_NO_STAGES: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Submission:
    """One request for one pipeline's orchestrator."""

    id: str  # unique among live requests, made from the x-request-id
    pipeline: str
    inputs: Mapping[
        str, str | bytes | list[int]
    ]  # {"messages": json[, "tools": json]}, {"text": raw} or {"text_ids": token ids}
    sampling: str  # Sampling.to_json()
    traceparent: str | None
    terms: Terms = terms.DEFAULT
    deep: bool = False  # whether Triton's own spans shall be in the trace


class Delta(NamedTuple):
    """What one lane message brought for one request. The first says "accepted": it may hold no text."""

    texts: list[str]  # each becomes one SSE event (normally one; one a token when the pipeline says so)
    finish_reason: str = ""  # "" until the last: stop | length
    prompt_tokens: int = 0  # set in the first (headers may go out then) and in the last
    completion_tokens: int = 0  # set in the last
    stages: Mapping[str, float] = _NO_STAGES  # ms by stage, in the last: for Server-Timing
    logprobs: Sequence[list[Entry]] = ()  # each text's, where they are asked for
    cached_tokens: int = 0  # of the prompt, set in the last
    pictures: Sequence[tuple[int, int]] = ()  # width and height of each picture of the prompt, in the first


class Stream(Protocol):
    """One request's deltas."""

    async def next(self) -> Delta:
        """The next one: all that has come since the last, so that a caller who keeps asking comes to wait.

        Raises StageError. After a delta with a finish_reason nothing more is asked.
        """

    def cancel(self) -> None:
        """Ends the request. Idempotent, synchronous, safe after the end; always called in the end."""


class Backend(Protocol):
    def pipelines(self) -> Mapping[str, Pipeline]:
        """Those served, by name."""

    def ready(self, pipeline: str) -> bool:
        """Whether it can answer now."""

    async def submit(self, submission: Submission) -> Stream:
        """Sends it. Raises StageError, `unavailable` where the pipeline cannot answer. A caller that is
        cancelled while this runs gets no Stream: what was sent by then is this method's to cancel."""

    async def recording(self, pipeline: str, span: str) -> bytes:
        """What was recorded of the request below this span (TRACE-SPAN), as a file; empty if nothing was. Raises
        StageError."""
