"""Which faults, when, and to whom: drawn from a seed, so that a run can be had again. Pure; does nothing itself."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KILL, STOP, TRITON, LEAVERS, DEAF, HOSTILE = "kill", "stop", "triton", "leavers", "deaf", "hostile"
STAGES = ("preprocess", "generate", "postprocess", "orchestrator")
# Dealt like cards: every six minutes or so have all of them, in an order of their own.
_DECK = (KILL, KILL, KILL, KILL, STOP, STOP, STOP, TRITON, LEAVERS, DEAF, HOSTILE, HOSTILE)
_PAUSE_S = (1.0, 4.0)  # after which a stopped process goes on by itself; the others are the product's to replace
_PAUSED = 1 / 3


@dataclass(frozen=True)
class Fault:
    """`at` is seconds from the beginning. A stop with `resumed_after` is a pause of so many seconds."""

    at: float
    kind: str
    pipeline: str = ""
    stage: str = ""
    resumed_after: float | None = None

    @property
    def breaks(self) -> bool:
        """Whether requests may fail of it. What clients do is no excuse."""
        return self.kind in (KILL, STOP, TRITON)

    def touches(self, pipeline: str) -> bool:
        return self.breaks and self.pipeline in ("", pipeline)

    def __str__(self) -> str:
        what = {
            KILL: f"SIGKILL of the {self.stage} stage of {self.pipeline}",
            STOP: f"SIGSTOP of the {self.stage} stage of {self.pipeline}",
            TRITON: "SIGKILL of tritonserver",
            LEAVERS: "clients that leave mid-stream",
            DEAF: "clients that do not read",
            HOSTILE: "hostile requests",
        }[self.kind]
        return what if self.resumed_after is None else f"{what} for {self.resumed_after:.1f} s"


def plan(seed: int, seconds: float, every_s: float, pipelines: Sequence[str]) -> list[Fault]:
    """One fault every `every_s`, within its first third; the end is left for the last one to be mended."""
    dice = random.Random(f"{seed} faults")
    faults: list[Fault] = []
    for number, kind in enumerate(_dealt(dice)):
        at = every_s * (number + dice.uniform(0.1, 0.4))
        if at > seconds - every_s / 2:
            return faults
        faults.append(_fault(dice, at, kind, pipelines))
    raise AssertionError("the deck is endless")


def _dealt(dice: random.Random) -> Iterator[str]:
    while True:
        yield from dice.sample(_DECK, len(_DECK))


def _fault(dice: random.Random, at: float, kind: str, pipelines: Sequence[str]) -> Fault:
    if kind not in (KILL, STOP):
        return Fault(at, kind)
    pipeline, stage = dice.choice(pipelines), dice.choice(STAGES)
    pause = dice.uniform(*_PAUSE_S) if kind == STOP and dice.random() < _PAUSED else None
    return Fault(at, kind, pipeline, stage, pause)
