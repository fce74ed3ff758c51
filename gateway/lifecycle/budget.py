"""How much memory there is, and who holds how much of it. Held is what is reserved, loaded or not.

Knows no states and does not know what its holders are.
"""

from __future__ import annotations

from typing import NamedTuple


class Memory(NamedTuple):
    """Bytes of either kind. Arithmetic is kind by kind, and so may be negative."""

    ram: int = 0
    gpu: int = 0

    def plus(self, other: Memory) -> Memory:
        return Memory(self.ram + other.ram, self.gpu + other.gpu)

    def minus(self, other: Memory) -> Memory:
        return Memory(self.ram - other.ram, self.gpu - other.gpu)

    def most(self, other: Memory) -> Memory:
        """The greater of each kind."""
        return Memory(max(self.ram, other.ram), max(self.gpu, other.gpu))

    def within(self, other: Memory) -> bool:
        return self.ram <= other.ram and self.gpu <= other.gpu

    def __str__(self) -> str:
        kinds = [
            f"{amount / 2**20:,.0f} MiB of {kind}" for kind, amount in (("RAM", self.ram), ("GPU", self.gpu)) if amount
        ]
        return " and ".join(kinds) or "no memory"


NOTHING = Memory()


class Budget:
    """`total` is never exceeded by what is reserved; only what was measured to be more than reserved can exceed it."""

    def __init__(self, total: Memory) -> None:
        self.total = total
        self.used = NOTHING
        self._held: dict[str, Memory] = {}

    @property
    def free(self) -> Memory:
        return self.total.minus(self.used)

    @property
    def excess(self) -> Memory:
        """By how much it is exceeded."""
        return self.used.minus(self.total).most(NOTHING)

    def held(self, holder: str) -> Memory:
        return self._held.get(holder, NOTHING)

    def reserve(self, holder: str, memory: Memory) -> None:
        """`memory` is what the holder has from here on, which must fit."""
        more = memory.minus(self.held(holder))
        if not more.most(NOTHING).within(self.free.most(NOTHING)):
            raise ValueError(f"{holder} cannot have {memory}: {self.free} of {self.total} are free")
        self.correct(holder, memory)

    def correct(self, holder: str, memory: Memory) -> None:
        """The holder has been found to have this much, whether it fits or not."""
        self.used = self.used.plus(memory).minus(self.held(holder))
        self._held[holder] = memory

    def release(self, holder: str) -> None:
        self.used = self.used.minus(self._held.pop(holder, NOTHING))
