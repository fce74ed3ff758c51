"""Which pipelines leave memory when another needs it: those whose return is expected to cost least for their bytes.

The score is frequency × seconds to bring it back ÷ bytes given up, lowest first. A pipeline may be parked or
unloaded; a parked one has less left to give. Pure functions; the scheduler and `bench.eviction` use the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gateway.lifecycle.budget import NOTHING, Memory

_VISIT_S = 300.0  # what comes within it of the last use is the same visit: the default keep-alive
_GOES_ON = 0.3  # of a visit, that it is not over yet
_SETTLES_S = 60.0


class Frequency:
    """How soon something is expected to be asked for again, as a rate a second: visits lately, and one that may go on.

    Each visit counts half as much a half-life later. Requests alone would say too little: those of one conversation
    come together, so a model is wanted far more in the minute after its last one than its frequency tells, and far less
    once the conversation is over. `docs/lifecycle.md` has what else was tried.
    """

    __slots__ = ("_at", "_half_life_s", "_used", "_visits")

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._visits = 0.0
        self._at = 0.0
        self._used = -math.inf

    def hit(self, now: float) -> None:
        """It is asked for."""
        if now - self._used > _VISIT_S:
            self._visits = self._decayed(now) + 1.0
            self._at = now
        self._used = now

    def use(self, now: float) -> None:
        """It is in use still."""
        self._used = now

    def rate(self, now: float) -> float:
        return self._decayed(now) * math.log(2) / self._half_life_s + _GOES_ON / (now - self._used + _SETTLES_S)

    def _decayed(self, now: float) -> float:
        return self._visits * 2.0 ** ((self._at - now) / self._half_life_s) if self._visits else 0.0


@dataclass(frozen=True, slots=True)
class Option:
    """One way to make room. `freed` is signed: parking may move bytes from the GPU to RAM."""

    name: str
    unload: bool  # else park
    freed: Memory
    rate: float
    back_s: float  # to bring it back


def score(rate: float, back_s: float, share: float) -> float:
    """Expected seconds of reloading a second, for each share of the memory given up."""
    return rate * back_s / share


def choose(options: Iterable[Option], shortage: Memory, total: Memory) -> list[Option]:
    """What makes up for the shortage, at most one option a name; empty if nothing does.

    A negative shortage is what is to spare of that kind.
    """
    options = list(options)
    # Parking may add to the one kind of memory what it frees of the other, and so not lead there at all.
    return _cheapest(options, shortage, total) or _cheapest([o for o in options if o.unload], shortage, total)


def _cheapest(options: Iterable[Option], shortage: Memory, total: Memory) -> list[Option]:
    ranked = sorted(
        ((score(option.rate, option.back_s, share), -share, option.name, option.unload), option)
        for option in options
        if (share := _share(option.freed, shortage, total)) > 0
    )
    chosen: dict[str, Option] = {}
    freed = NOTHING
    for _, option in ranked:
        if shortage.within(freed):
            break
        before = chosen.get(option.name)
        if before is not None and before.unload:
            continue
        chosen[option.name] = option
        freed = freed.plus(option.freed).minus(before.freed if before else NOTHING)
    if not shortage.within(freed):
        return []
    for option in reversed(list(chosen.values())):  # the later, larger ones may have made the earlier needless
        without = freed.minus(option.freed)
        if shortage.within(without):
            del chosen[option.name]
            freed = without
    return list(chosen.values())


def _share(freed: Memory, shortage: Memory, total: Memory) -> float:
    """What it gives of the kinds that are short, as a part of all there is of them."""
    share = 0.0
    if shortage.ram > 0:
        share += max(freed.ram, 0) / max(total.ram, 1)
    if shortage.gpu > 0:
        share += max(freed.gpu, 0) / max(total.gpu, 1)
    return share
