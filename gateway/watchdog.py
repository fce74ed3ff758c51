"""Which stage of which pipeline hangs, told from what a gateway sees of it. Knows no clock, no Triton and no process.

A process that ends is noticed by itself (`gateway.supervisor`); one that hangs only keeps silent. Three silences tell:

- **The lane** brings no message, not even a heartbeat. The orchestrator makes those of a poll of generate and, with
  tokens, a call of postprocess.
- **No request is taken**: one has waited for so long, and no other was taken since. To take it the orchestrator calls
  preprocess.
- **The engine** has requests, and its counters stand still while heartbeats go on: generate hangs inside a step.

In the first two any stage of the chain may be what hangs; which, an own call of each tells. `to_ask` says whom to call,
`answered` hears who did answer: who does not it is, and if all do, it is the orchestrator.

Each pipeline is reported once and is then unknown until it is watched again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

OF_HEARTBEATS = ("generate", "postprocess")  # in this order: postprocess waits for nobody
OF_TAKING = ("preprocess",)
_PROGRESS = ("steps", "output_tokens", "finished", "cancelled")  # of the engine's counters: each is of a step's end


class Stall(NamedTuple):
    pipeline: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Patience:
    """Seconds. A step must take less than `token_gap_s`, the one with the longest chunk of a prompt too; 0: never mind.

    `accept_s` is less than what the gateway itself lets a request wait for that: it has ended by then.
    `look_s`: between two calls no more than this counts. Who was held up itself has not listened meanwhile.
    """

    silent_s: float = 5.0
    answer_s: float = 2.0  # for a stage that is asked directly
    token_gap_s: float = 10.0
    accept_s: float = 10.0
    look_s: float = 2.0


@dataclass
class _Watched:
    """One pipeline."""

    heard: float  # when its lane last brought something, or it began to be watched
    asked: dict[str, float] = field(default_factory=dict)  # when each stage was, in the silence that there is now
    answers: set[str] = field(default_factory=set)
    progress: tuple[float, ...] = ()
    busy: bool = False
    moved: float = 0.0  # when the engine's counters did, or when it got something to do
    waiting: dict[str, float] = field(default_factory=dict)  # by request, when it was submitted
    taken: float = 0.0  # when any was last

    def waited_s(self, time: float) -> float:
        return time - max(next(iter(self.waiting.values())), self.taken) if self.waiting else 0.0

    def broken_silence(self, stages: tuple[str, ...]) -> None:
        """What was asked in it, and answered, says nothing of the next."""
        for stage in stages:
            self.asked.pop(stage, None)
            self.answers.discard(stage)


class Watchdog:
    """Told what happens, asked by `stalled` every half second or so."""

    def __init__(self, patience: Patience | None = None) -> None:
        self._patience = patience or Patience()
        self._watched: dict[str, _Watched] = {}
        self._latest: float | None = None
        self._time = 0.0  # of `now`, what counts

    def watch(self, pipeline: str, now: float) -> None:
        """It is loaded, or whole again: its lane is to open, which takes a second at most."""
        self._watched[pipeline] = _Watched(self._counted(now))

    def forget(self, pipeline: str) -> None:
        """It is being repaired, unloaded, or gone with its server."""
        self._watched.pop(pipeline, None)

    def heard(self, pipeline: str, now: float, counters: Mapping[str, float] | None = None) -> None:
        """Its lane brought a message, with the engine's counters where that has them."""
        time = self._counted(now)
        if not (watched := self._watched.get(pipeline)):
            return
        watched.heard = time
        watched.broken_silence(OF_HEARTBEATS)
        if counters:
            progress = tuple(counters.get(name, 0) for name in _PROGRESS)
            busy = counters.get("running", 0) + counters.get("waiting", 0) > 0
            if progress != watched.progress or not watched.busy:
                watched.moved = time
            watched.progress, watched.busy = progress, busy

    def submitted(self, pipeline: str, id: str, now: float) -> None:
        """Not for requests with pictures: they wait for hosts and for memory, which is no fault of preprocess."""
        time = self._counted(now)
        if watched := self._watched.get(pipeline):
            watched.waiting[id] = time

    def taken(self, pipeline: str, id: str, now: float) -> None:
        """Its first event came: preprocess has done its part, and generate has it."""
        time = self._counted(now)
        if (watched := self._watched.get(pipeline)) and watched.waiting.pop(id, None) is not None:
            watched.taken = time
            watched.broken_silence(OF_TAKING)

    def ended(self, pipeline: str, id: str) -> None:
        """Taken or not, nobody waits for it any more."""
        if watched := self._watched.get(pipeline):
            watched.waiting.pop(id, None)
            if not watched.waiting:
                watched.broken_silence(OF_TAKING)

    def to_ask(self, now: float) -> list[tuple[str, str]]:
        """Pipelines and stages to call now, once each silence, and not to wait for."""
        time, patience, asked = self._counted(now), self._patience, []
        for name, watched in self._watched.items():
            stages: tuple[str, ...] = (
                OF_HEARTBEATS if time - watched.heard >= patience.silent_s - patience.answer_s else ()
            )
            stages += OF_TAKING if watched.waited_s(time) >= patience.accept_s - patience.answer_s else ()
            for stage in stages:
                if stage not in watched.asked:
                    watched.asked[stage] = time
                    asked.append((name, stage))
        return asked

    def answered(self, pipeline: str, stage: str) -> None:
        """With an error too, if it is the stage's own: "is not healthy" says Triton, of one that does not answer."""
        if watched := self._watched.get(pipeline):
            watched.answers.add(stage)

    def stalled(self, now: float) -> list[Stall]:
        """What hangs; nothing of those pipelines is heard from here on."""
        time = self._counted(now)
        stalls = [stall for name, watched in self._watched.items() if (stall := self._stall(name, watched, time))]
        for stall in stalls:
            self.forget(stall.pipeline)
        return stalls

    def _counted(self, now: float) -> float:
        if self._latest is not None:
            self._time += min(max(0.0, now - self._latest), self._patience.look_s)
        self._latest = now
        return self._time

    def _stall(self, pipeline: str, watched: _Watched, time: float) -> Stall | None:
        patience = self._patience
        silent_s, waited_s, gap_s = time - watched.heard, watched.waited_s(time), time - watched.moved
        if silent_s >= patience.silent_s:
            return self._culprit(pipeline, watched, OF_HEARTBEATS, time, f"no heartbeat for {silent_s:.1f} s")
        if watched.busy and patience.token_gap_s and gap_s >= patience.token_gap_s:
            return Stall(pipeline, "generate", f"the engine has requests, and made no step for {gap_s:.1f} s")
        if waited_s >= patience.accept_s:
            return self._culprit(pipeline, watched, OF_TAKING, time, f"no request was taken for {waited_s:.1f} s")
        return None

    def _culprit(
        self, pipeline: str, watched: _Watched, stages: tuple[str, ...], time: float, reason: str
    ) -> Stall | None:
        asked = [watched.asked.get(stage, time) for stage in stages]
        if time - max(asked) < self._patience.answer_s:
            return None  # `to_ask` is next, or its answers are still on their way
        for stage in stages:
            if stage not in watched.answers:
                return Stall(pipeline, stage, f"{reason}, and {stage} does not answer")
        return Stall(pipeline, "orchestrator", f"{reason}, and the other stages answer")
