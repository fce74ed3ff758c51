"""From logits to tokens: one row a request, each drawn from its own seed and position and from nothing else.

Knows no model and no request: a row's token does not depend on which rows are beside it, so a seed reproduces
an answer whatever else runs. Stateless: the same arguments always give the same tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.engine import Constraint, Logprob
from pipelines.sampling import Sampling

BROKEN = -1  # in place of a token: this row's logits hold a NaN, or nothing finite

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_NUCLEUS = 1024  # how many of a row's likeliest are sorted at first; most nuclei are far smaller


class Choice(NamedTuple):
    """A row's next token, or BROKEN."""

    token_id: int
    logprob: Logprob | None = None


class Draw:
    """One request's way from logits to tokens: what it asked for, and how far it is."""

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        eos_ids: Collection[int],
        constraint: Constraint | None = None,
    ) -> None:
        self.sampling = sampling
        self.generated = 0

    def accept(self, token_id: int) -> None:
        self.generated += 1


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Choice]:
    """The next token of each row of `logits` [B, V]."""
    tokens = tokens_of(logits, [draw.sampling for draw in draws], [draw.generated for draw in draws])
    return [Choice(token) for token in tokens]


def tokens_of(logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """One token a row of `logits` [B, V]. `positions`: how many tokens each request has generated so far."""
    tokens = logits.argmax(-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen = [samplings[row] for row in drawn]
        draws = [uniform(_seed(samplings[row]), positions[row]) for row in drawn]
        tokens[rows] = _draw(logits[rows], chosen, _doubles(draws, logits))
    tokens.masked_fill_(~torch.isfinite(logits.amax(-1)), BROKEN)
    found: list[int] = tokens.tolist()
    return found


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from seed and position alone: splitmix64 of the two, its upper 53 bits."""
    return (_mix((_mix(seed & _MASK) + position * _GAMMA) & _MASK) >> 11) * 2.0**-53


def _draw(logits: Tensor, samplings: Sequence[Sampling], draws: Tensor) -> Tensor:
    """The inverse of the cumulative distribution at `draws`. In float64: float32 loses a vocabulary's tail.

    The tokens are taken in vocabulary order and not by probability, so that rounding that swaps two near
    neighbours moves a boundary by as much as the rounding and not by a token's whole share.
    """
    temperatures = _doubles([sampling.temperature for sampling in samplings], logits)
    wide = logits.double()
    wide = (wide - wide.amax(-1, keepdim=True)) / temperatures[:, None]  # less the maximum: no overflow
    probabilities = torch.softmax(wide, -1)
    narrowed = [row for row, sampling in enumerate(samplings) if sampling.top_p < 1]
    if narrowed:
        rows = torch.tensor(narrowed, device=logits.device)
        top_p = _doubles([samplings[row].top_p for row in narrowed], logits)
        probabilities[rows] = _nucleus(probabilities[rows], top_p)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding may reach the total
    return torch.searchsorted(cumulative, torch.minimum(draws[:, None] * total, below), right=True)[:, 0]


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """The fewest likeliest tokens that together have `top_p`, at least one; the others at 0."""
    size = probabilities.shape[-1]
    likeliest, tokens = probabilities.topk(min(_NUCLEUS, size), -1)
    short = likeliest.sum(-1) < top_p  # each row for itself, so that its neighbours do not matter
    kept = torch.zeros_like(probabilities)
    kept.scatter_(-1, tokens, _head(likeliest, top_p))
    if size > _NUCLEUS and bool(short.any()):
        likeliest, tokens = probabilities[short].sort(-1, descending=True)
        kept[short] = torch.zeros_like(likeliest).scatter_(-1, tokens, _head(likeliest, top_p[short]))
    return kept


def _head(likeliest: Tensor, top_p: Tensor) -> Tensor:
    """Of probabilities in falling order: those before which less than `top_p` came, and the first."""
    before = likeliest.cumsum(-1) - likeliest
    head = torch.where(before < top_p[:, None], likeliest, 0)
    head[:, 0] = likeliest[:, 0]
    return head


def _doubles(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)


def _seed(sampling: Sampling) -> int:
    if sampling.seed is None:
        raise ValueError("a request that is drawn needs a seed: Sampling.with_seed gives it one")
    return sampling.seed


def _mix(value: int) -> int:
    """splitmix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014)."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
