"""One request's side of the drawing: what it has said, and what that changes in its next scores.

Knows no torch, no other request and no logits: `sampler` asks for what to change, a row at a time, as numpy arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.engine import Constraint
from pipelines.errors import StageError
from pipelines.sampling import Sampling

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


class Edits(NamedTuple):
    """Tokens whose scores change: times the factor where negative, else divided by it; then the shift is added."""

    ids: np.ndarray[Any, np.dtype[np.int64]]
    factors: np.ndarray[Any, np.dtype[np.float32]]
    shifts: np.ndarray[Any, np.dtype[np.float32]]


class Draw:
    """What it draws next depends on its seed and on how many tokens it has `generated`, and on no other request.

    `error` is why it cannot go on, where its constraint has failed; its row is then BROKEN.
    """

    __slots__ = (
        "_ends",
        "_penalised",
        "_places",
        "_said",
        "_state",
        "_table",
        "constraint",
        "error",
        "generated",
        "sampling",
    )

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        eos_ids: Iterable[int],
        constraint: Constraint | None = None,
    ) -> None:
        if sampling.temperature > 0 and sampling.seed is None:
            raise ValueError("a request that is drawn needs a seed: Sampling.with_seed gives it one")
        self.sampling = sampling
        self.constraint = constraint
        self.generated = 0
        self.error = ""
        self._ends = sorted(eos_ids)
        self._said: set[int] = set()
        self._state = _mix((sampling.seed or 0) & _MASK)
        repetition = sampling.repetition_penalty
        self._penalised = bool(sampling.presence_penalty or sampling.frequency_penalty or repetition != 1)
        changed = {*prompt_ids} if repetition != 1 else set()
        changed.update(token_id for token_id, _ in sampling.logit_bias)
        ids = sorted(changed)
        self._places = {token_id: place for place, token_id in enumerate(ids)}
        self._table = Edits(np.array(ids, np.int64), np.ones(len(ids), np.float32), np.zeros(len(ids), np.float32))
        if repetition != 1:
            self._table.factors[[self._places[token_id] for token_id in {*prompt_ids}]] = repetition
        for token_id, bias in sampling.logit_bias:
            self._table.shifts[self._places[token_id]] = bias

    def accept(self, token_id: int) -> None:
        """A token that was taken. A constraint that fails here is told of by the next `sample`."""
        self.generated += 1
        if self._penalised:
            self._penalise(token_id)
        if self.constraint is not None:
            try:
                self.constraint.accept(token_id)
            except Exception as error:
                self.error = _why(error)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the scores as they are is the one."""
        return (
            self.sampling.temperature == 0
            and not self._places
            and self.constraint is None
            and self.generated >= self.sampling.min_tokens
        )

    @property
    def narrowed(self) -> bool:
        return bool(self.sampling.top_k or self.sampling.min_p) or self.sampling.top_p < 1

    def uniform(self) -> float:
        """A number in [0, 1) from seed and position alone: splitmix64 of the two, its upper 53 bits."""
        return (_mix((self._state + self.generated * _GAMMA) & _MASK) >> 11) * 2.0**-53

    def edits(self, size: int) -> Edits:
        """Of the first `size` tokens: a model cannot say others, so that a bias of them changes nothing."""
        count = len(self._places)
        table = Edits(self._table.ids[:count], self._table.factors[:count], self._table.shifts[:count])
        if count and (beyond := table.ids >= size).any():
            return Edits(table.ids[~beyond], table.factors[~beyond], table.shifts[~beyond])
        return table

    def forbidden(self, size: int) -> list[int]:
        """The end ids, until there are min_tokens."""
        if self.generated >= self.sampling.min_tokens:
            return []
        return [token_id for token_id in self._ends if token_id < size]

    def allowed(self, size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """What the constraint allows of the first `size` tokens; nothing where it has failed. May wait for it."""
        allowed = np.zeros(size, np.bool_)
        if self.constraint is None or self.error:
            return allowed
        try:
            bits = np.unpackbits(self.constraint.mask().view(np.uint8), bitorder="little")[:size]
        except Exception as error:
            self.error = _why(error)
            return allowed
        allowed[: len(bits)] = bits
        if not allowed.any():
            self.error = "the constraint allows no token"
        return allowed

    def _penalise(self, token_id: int) -> None:
        """Presence once, frequency each time; repetition is a factor, however often a token is there."""
        place = self._places.get(token_id, -1)
        if place < 0:
            place = self._places[token_id] = len(self._places)
            if place == len(self._table.ids):
                self._table = Edits(*(np.resize(column, 2 * place + 16) for column in self._table))
            self._table.ids[place], self._table.shifts[place] = token_id, 0
        self._table.factors[place] = self.sampling.repetition_penalty
        self._table.shifts[place] -= self.sampling.frequency_penalty
        if token_id not in self._said:
            self._said.add(token_id)
            self._table.shifts[place] -= self.sampling.presence_penalty


def _why(error: Exception) -> str:
    return error.message if isinstance(error, StageError) else f"{type(error).__name__}: {error}"


def _mix(value: int) -> int:
    """splitmix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014)."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
