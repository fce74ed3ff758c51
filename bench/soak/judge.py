"""What became of a request, and whether a fault excuses it. Pure: told results and times, it asks nobody.

A request is on a faulted pipeline if a fault of it, or of all, was not mended at some moment of its life.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bench.client import Result
from bench.soak.asks import Ask
from bench.soak.plan import Fault

LATE_S = 1.0  # after its deadline a request may still be on its way to its client for so long
HANG_S = 15.0  # … and after this nobody believes that it comes

EXACT = "exact"  # the answer that was asked for, whole
TIMED_OUT = "timed out"  # where that was right: its deadline was too short for it
REFUSED = "refused"  # 429 or 503, with Retry-After
FAILED = "failed"  # an error event and no [DONE], or a 504; what came before was right
WRONG = "wrong"  # another answer
BROKEN = "broken"  # what no client should see: [DONE] after an error, a stream that just ends, a 500
HANG = "hang"
OUTCOMES = (EXACT, TIMED_OUT, REFUSED, FAILED, WRONG, BROKEN, HANG)
SUCCESSES = (EXACT, TIMED_OUT)


def outcome(ask: Ask, result: Result) -> str:
    text = "".join(result.text or ())
    error = result.error
    if error == "timeout":  # of the client, whose patience is longer than any deadline
        return HANG
    if ask.text is not None and not ask.text.startswith(text):
        return WRONG
    if error is None:
        whole = ask.text is None or (text == ask.text and result.tokens == ask.tokens)
        return EXACT if whole and result.finish_reason else WRONG
    if result.done:
        return BROKEN
    if result.status in (429, 503):
        return REFUSED if "retry-after" in result.headers else BROKEN
    if result.status == 504 or error == "error event: timeout":
        return TIMED_OUT if ask.hurried else FAILED
    return FAILED if error.startswith("error event: ") else BROKEN


@dataclass
class Window:
    """A fault from its beginning until each pipeline that it touches answered again."""

    fault: Fault
    began: float
    mended: dict[str, float] = field(default_factory=dict)  # by pipeline; missing: not yet

    def touches(self, pipeline: str, began: float, ended: float) -> bool:
        until = self.mended.get(pipeline, math.inf)
        return self.fault.touches(pipeline) and began <= until and ended >= self.began

    @property
    def recovery_s(self) -> dict[str, float]:
        return {pipeline: until - self.began for pipeline, until in self.mended.items()}


@dataclass(frozen=True)
class Judged:
    outcome: str
    on_fault: bool
    late: bool


def judge(ask: Ask, result: Result, outcome: str, windows: Iterable[Window]) -> Judged:
    """At the end of all: only then is known how long each window was."""
    on_fault = any(window.touches(ask.pipeline, result.started, result.ended) for window in windows)
    late = result.ended - result.started > ask.deadline_s + LATE_S
    return Judged(outcome, on_fault, late)


@dataclass
class Tally:
    """All judgements, counted."""

    off_fault: Counter[str] = field(default_factory=Counter)
    on_fault: Counter[str] = field(default_factory=Counter)
    late: int = 0

    def add(self, judged: Judged) -> None:
        (self.on_fault if judged.on_fault else self.off_fault)[judged.outcome] += 1
        self.late += judged.late

    @property
    def success_off_fault(self) -> float:
        total = self.off_fault.total()
        return sum(self.off_fault[name] for name in SUCCESSES) / total if total else math.nan

    def count(self, name: str) -> int:
        return self.off_fault[name] + self.on_fault[name]


def missed(tally: Tally, windows: Sequence[Window], pipelines: Sequence[str], problems: Sequence[str]) -> list[str]:
    """The goals that were not reached, in words; none: it passed."""
    goals = []
    if not tally.success_off_fault >= 0.9999:  # nan too
        goals.append(f"{tally.success_off_fault:.4%} of the requests not on a faulted pipeline succeeded")
    if tally.late:
        goals.append(f"{tally.late} past their deadline")
    goals += [f"{tally.count(name)} {name}" for name in (WRONG, BROKEN, HANG) if tally.count(name)]
    for window in windows:
        waiting = [name for name in pipelines if window.fault.touches(name) and name not in window.mended]
        if waiting:
            goals.append(f"{', '.join(waiting)} did not come back from: {window.fault}")
    return [*goals, *problems]
