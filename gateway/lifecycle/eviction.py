"""Which pipelines leave memory when another needs it: those whose return is expected to cost least for their bytes.

The score is frequency × seconds to bring it back ÷ bytes given up, lowest first. A pipeline may be parked or
unloaded; a parked one has less left to give. Pure functions; the scheduler and `bench.eviction` use the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gateway.lifecycle.budget import NOTHING, Memory


class Frequency:
    """How often something has happened lately, a second: each occurrence counts half as much a half-life later."""

    __slots__ = ("_at", "_count", "_half_life_s")

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._count = 0.0
        self._at = 0.0

    def hit(self, now: float) -> None:
        self._count = self._decayed(now) + 1.0
        self._at = now

    def rate(self, now: float) -> float:
        return self._decayed(now) * math.log(2) / self._half_life_s

    def _decayed(self, now: float) -> float:
        return self._count * 2.0 ** ((self._at - now) / self._half_life_s) if self._count else 0.0


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
    """What makes up for the shortage, at most one option a name; empty if nothing does."""
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
