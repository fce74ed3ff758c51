"""Who runs in the next step, in which slot, on how many tokens. Pure bookkeeping, tested without a model.

The running are rows in slots 0, 1, 2 …, those that decode first, so that a batch of them is a view of the cache. Every
row has tokens, the first `computed` of which have keys and values in its slot; a step computes more: of one that
decodes its last token, of a prompt a chunk. What an ended row computed is kept in a slot behind the running, to be some
later prompt's beginning, until its slot or its room is needed.

Room is counted in positions. Rows are admitted when all their tokens fit; what they generate may not: then what is
kept goes first, oldest first, and then the row that came last waits again, to compute its tokens anew (its draws depend
on its seed and its place alone, so its answer is the same).

Knows no model, no sampling, no clock and no text.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np

from pipelines.engine import Request

Ids: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

ALONE = 512  # prompt tokens a step takes in when nobody decodes
BESIDE = 32  # and beside rows that decode, which get a token each step all the same
TILE = 8  # rows that the kernels compute together
LEAST_SHARED = 16  # a shorter common beginning is computed again: copying it is no cheaper
MAX_KEPT = 32  # ended rows whose slots are kept
GRAIN = 64  # positions that room is counted in
_MAX_HELD = 4  # how many of those that wait are looked past in a step


class Cache(Protocol):
    """What holds the keys and values: slots that can be copied."""

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one slot into another."""

    def swap(self, one: int, other: int, length: int) -> None: ...


@dataclass(eq=False)
class Row:
    """A request from its arrival to its end. `order` is its place among all: priority, then arrival."""

    request: Request
    order: tuple[int, int]
    tokens: list[int]  # the prompt, and what was generated
    limit: int  # tokens at most, prompt and answer together
    computed: int = 0
    cached_tokens: int = 0  # of the prompt, taken from another slot when it was admitted
    admitted: bool = False
    finish_reason: str = ""
    error: str = ""
    alone: bool = False  # what it computed so far is no beginning for another
    draw: Any = None  # the engine's: how its tokens are drawn
    given: Any = None  # the engine's: what the model is given of its pictures
    ids: Ids = field(init=False)  # what it comes with, by identity: its tokens when it was last put in the queue

    def __post_init__(self) -> None:
        self.ids = self.identity()

    def identity(self, length: int | None = None) -> Ids:
        """The first tokens as beginnings are compared by: for those that stand for a picture, which picture."""
        prompt = self.request.identity
        if prompt is None:
            return np.array(self.tokens[:length])
        return np.array([*prompt, *self.tokens[len(prompt) :]][:length])

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def decodes(self) -> bool:
        return self.pending == 1

    def __lt__(self, other: Row) -> bool:
        return self.order < other.order


@dataclass(frozen=True)
class Chunk:
    """The next tokens of a row that are computed: all that are pending, or the first of them."""

    row: Row
    slot: int
    start: int
    length: int

    @property
    def last(self) -> bool:
        return self.start + self.length == len(self.row.tokens)


@dataclass(frozen=True)
class Plan:
    """One step: a token for each of the rows in the slots from `first`, and chunks of prompts."""

    decode: Sequence[Row] = ()
    chunks: Sequence[Chunk] = ()
    first: int = 0

    @property
    def sampled(self) -> list[Row]:
        """Those whose next token the step gives."""
        return [*self.decode, *(chunk.row for chunk in self.chunks if chunk.last)]

    def advance(self) -> None:
        """What it computed is computed."""
        for row in self.decode:
            row.computed += 1
        for chunk in self.chunks:
            chunk.row.computed += chunk.length

    def alone(self) -> list[Plan]:
        """The same, a row at a time: to find whose failure it is."""
        single = [Plan([row], first=slot) for slot, row in enumerate(self.decode, self.first)]
        return single + [Plan(chunks=[chunk]) for chunk in self.chunks]


@dataclass
class _Kept:
    tokens: Ids
    used: int  # when, in admissions


@dataclass(frozen=True)
class _Match:
    """The slot with the longest common beginning."""

    slot: int = -1
    length: int = 0
    whole: bool = False  # whether that is all the slot holds, so that nothing is lost if it is taken


def by_position(lengths: Sequence[int]) -> int:
    """What slots of these lengths take where memory is used as it is written."""
    return sum(-(-length // GRAIN) for length in lengths) * GRAIN


def by_rectangle(lengths: Sequence[int]) -> int:
    """What they take where every slot is as long as the longest."""
    return len(lengths) * by_position([max(lengths, default=0)])


def as_many(decoding: int) -> int:
    """Prompt tokens beside so many rows: as many again, and what fills the last tile. The step is twice as long."""
    return -(-2 * decoding // TILE) * TILE - decoding


def some(decoding: int) -> int:
    """Prompt tokens beside so many rows where a few more cost little."""
    return max(BESIDE, decoding)


@dataclass
class Scheduler:
    """`capacity` is in positions. Without `share` nothing is kept or copied; without `chunked` prompts come whole."""

    cache: Cache
    capacity: int
    max_running: int
    share: bool = True
    chunked: bool = True
    beside: Callable[[int], int] = some
    alone: int = ALONE
    charge: Callable[[Sequence[int]], int] = by_position
    running: list[Row] = field(default_factory=list)
    waiting: list[Row] = field(default_factory=list)  # a heap
    prompt_tokens: int = 0  # of all that were admitted
    cached_tokens: int = 0  # of those, how many were not computed again
    preempted: int = 0
    _kept: dict[int, _Kept] = field(default_factory=dict)
    _now: int = 0

    @property
    def kept(self) -> dict[int, Sequence[int]]:
        """What the slots behind the running hold."""
        return {slot: kept.tokens.tolist() for slot, kept in self._kept.items()}

    @property
    def kept_lengths(self) -> dict[int, int]:
        return {slot: len(kept.tokens) for slot, kept in self._kept.items()}

    @property
    def slots(self) -> int:
        """How many there are at most."""
        return self.max_running + (MAX_KEPT if self.share else 0)

    def submit(self, row: Row) -> None:
        heapq.heappush(self.waiting, row)

    def end(self, ended: Callable[[Row], str]) -> list[Row]:
        """Take out the rows, waiting or running, for which this gives a finish_reason."""
        out = []
        for row in [*self.waiting, *self.running]:
            if reason := ended(row):
                row.finish_reason = reason
                out.append(row)
        if out:
            self.waiting = [row for row in self.waiting if not row.finish_reason]
            heapq.heapify(self.waiting)
            self.retire()
        return out

    def plan(self) -> Plan:
        """The next step. Whoever carries it out calls `computed` for what was computed."""
        self._make_room()
        decoding = sum(1 for row in self.running if row.decodes)
        budget = self.beside(decoding) if decoding else self.alone
        if self.waiting:
            self._admit(budget - sum(row.pending for row in self.running if not row.decodes))
        decoding = self._arrange()
        chunks = []
        for slot, row in enumerate(self.running[decoding:], decoding):
            if budget <= 0:
                break
            length = min(row.pending, budget) if self.chunked else row.pending
            budget -= length
            chunks.append(Chunk(row, slot, row.computed, length))
        return Plan(self.running[:decoding], chunks)

    def retire(self) -> None:
        """Take the rows with a finish_reason out of the running."""
        for slot in reversed(range(len(self.running))):
            row = self.running[slot]
            if row.finish_reason:
                self._vacate(slot, keep=self.share and not row.error and not row.alone)

    def forget(self) -> None:
        """Give up what is kept; what the running have computed so far is theirs alone."""
        self._kept.clear()
        for row in self.running:
            row.alone = True

    def _make_room(self) -> None:
        """For one more position of every row: what is kept goes first, then whoever came last waits again."""
        while not self._fits(self.running):
            row = max(self.running)
            self._vacate(self.running.index(row), keep=False)
            row.computed, row.ids, row.alone = 0, row.identity(), False
            self.preempted += 1
            self.submit(row)

    def _admit(self, budget: int) -> None:
        """In order, until the step has enough to compute; nobody overtakes one that does not fit."""
        held: list[Row] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_running and len(held) < _MAX_HELD:
            row = heapq.heappop(self.waiting)
            match = self._match(row.ids) if self.share else _Match()
            if self.share and self._comes(row.ids, match.length):
                held.append(row)  # what it begins with is being computed: it waits for that, others need not
                continue
            again = row.admitted and bool(self.running)  # it had to wait again: not to be back for a few tokens only
            if not self._fits([*self.running, row], more=GRAIN if again else 0, spare=match.slot):
                held.append(row)
                break
            self._place(row, match)
            budget -= row.pending
        for row in held:
            self.submit(row)

    def _fits(self, rows: Sequence[Row], more: int = 0, spare: int = -1) -> bool:
        """Whether there is room for all tokens of these rows, and `more` of each.

        What is kept is given up for it, oldest first and the slot `spare` last.
        """
        lengths = [len(row.tokens) + more for row in rows]
        if self.charge(lengths) > self.capacity:
            return False
        while self._kept and self.charge([*lengths, *self.kept_lengths.values()]) > self.capacity:
            oldest = min(self._kept, key=lambda slot: (slot == spare, self._kept[slot].used))
            del self._kept[oldest]
        return True

    def _match(self, ids: Ids) -> _Match:
        """One token is always left to compute: its logits are what is wanted."""
        best = _Match()
        for slot, row in enumerate(self.running):
            length = 0 if row.alone else min(_shared(row.ids, ids), row.computed, len(ids) - 1)
            if length > best.length:
                best = _Match(slot, length)
        for slot, kept in self._kept.items():
            length = min(shared := _shared(kept.tokens, ids), len(ids) - 1)
            if length > best.length:
                best = _Match(slot, length, whole=shared >= len(kept.tokens) - 1)
        return best if best.length >= LEAST_SHARED else _Match()

    def _comes(self, ids: Ids, have: int) -> bool:
        """Whether a prompt that is being computed will have more of these tokens than there are now."""
        wanted = max(have + 1, LEAST_SHARED)
        return any(
            row.computed < (shared := min(_shared(row.ids, ids), len(ids) - 1)) and shared >= wanted
            for row in self.running
            if not row.decodes and not row.alone
        )

    def _place(self, row: Row, match: _Match) -> None:
        slot = len(self.running)
        if match.slot in self._kept:
            self._now += 1
            self._kept[match.slot].used = self._now
        elif match.slot >= slot:  # it was given up for room
            match = _Match()
        if match.slot == slot:
            if not match.whole:
                self._keep_elsewhere(slot)
            self._kept.pop(slot, None)
        else:
            if slot in self._kept:
                self._keep_elsewhere(slot)
            if match.length:
                self.cache.copy(match.slot, slot, match.length)
                if match.whole:
                    self._kept.pop(match.slot, None)
        row.computed = match.length
        if not row.admitted:
            row.admitted, row.cached_tokens = True, match.length
            self.prompt_tokens += len(row.tokens)
            self.cached_tokens += match.length
        self.running.append(row)

    def _keep_elsewhere(self, slot: int) -> None:
        """Its slot is needed: what is kept there moves to a free one, if there is room for both."""
        kept = self._kept.pop(slot)
        free = self._free(slot + 1)
        self.cache.copy(slot, free, len(kept.tokens))
        self._kept[free] = kept

    def _vacate(self, slot: int, *, keep: bool) -> None:
        """Take a row out; the last one moves into its slot, and what it computed stays or moves behind them."""
        row, last = self.running[slot], self.running.pop()
        ids = row.identity(row.computed)
        keep = keep and self._worth_keeping(ids)
        target = len(self.running)
        if last is not row:
            if keep:
                self.cache.copy(slot, target := self._free(len(self.running) + 1), len(ids))
            self.running[slot] = last
            self.cache.copy(len(self.running), slot, last.computed)
        if keep:
            self._kept[target] = _Kept(ids, self._now)

    def _worth_keeping(self, ids: Ids) -> bool:
        """If so there is place for it: what it begins with is not kept beside it, and the oldest may have to go."""
        if len(ids) < LEAST_SHARED or any(_shared(kept.tokens, ids) == len(ids) for kept in self._kept.values()):
            return False
        self._kept = {at: kept for at, kept in self._kept.items() if _shared(kept.tokens, ids) < len(kept.tokens)}
        if len(self._kept) >= MAX_KEPT:
            del self._kept[min(self._kept, key=lambda at: self._kept[at].used)]
        self._now += 1
        return True

    def _free(self, first: int) -> int:
        return next(slot for slot in range(first, self.slots) if slot not in self._kept)

    def _arrange(self) -> int:
        """Those that decode into the first slots; answers how many they are."""
        first, last = 0, len(self.running) - 1
        while True:
            while first <= last and self.running[first].decodes:
                first += 1
            while first <= last and not self.running[last].decodes:
                last -= 1
            if first > last:
                return first
            one, other = self.running[first], self.running[last]
            self.cache.swap(first, last, max(one.computed, other.computed))
            self.running[first], self.running[last] = other, one


def _shared(one: Ids, other: Ids) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    if not length or one[0] != other[0]:
        return 0
    differ = one[:length] != other[:length]
    at = int(differ.argmax())
    return at if differ[at] else length
