"""From logits to tokens: one row a request, each drawn from its own seed and position and from nothing else.

Knows no model and no request: a row's token does not depend on which rows are beside it, so a seed reproduces
an answer whatever else runs. What a request has said so far, and what that changes, is its `Draw`.

In this order: penalties and logit_bias, the end ids that min_tokens forbids, the constraint, temperature, top_k,
top_p, min_p, the draw. All three narrowings keep a head of the tokens in falling order, so each row has one cut:
the probability that its last kept token has. Finding it needs a head that is long enough, and rarely the whole row.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.engine import Logprob
from pipelines.engine.draw import Draw
from pipelines.sampling import MAX_TOP_LOGPROBS

__all__ = ["BROKEN", "Choice", "Draw", "sample"]

BROKEN = -1  # in place of a token: this row's logits hold a NaN, or nothing finite, or its draw has an error

_BLOCK = 64  # a row is looked at in blocks of so many: their greatest say where the greatest of all are
_HEADS = (1024, 8192)  # how many of a row's likeliest are sorted, if the first blocks do not hold its head


_scratch = threading.local()


class Choice(NamedTuple):
    token_id: int
    logprob: Logprob | None = None


@torch.inference_mode()
def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Choice]:
    """One token a row of `logits` [B, V], which are left as they are. A row of no token is BROKEN."""
    tokens, best = _likeliest(logits)
    tokens.masked_fill_(~torch.isfinite(best), BROKEN)
    changed = [row for row, draw in enumerate(draws) if not draw.plain]
    if changed:
        rows = torch.tensor(changed, device=logits.device)
        scores = _copy(logits, rows)
        chosen = _changed(scores, [draws[row] for row in changed])
        tokens[rows] = torch.where(tokens[rows] == BROKEN, BROKEN, chosen)
    found: list[int] = tokens.tolist()
    choices = [Choice(token) for token in found]
    told = [row for row, draw in enumerate(draws) if draw.sampling.logprobs and found[row] != BROKEN]
    if told:
        wanted = [draws[row].sampling.top_logprobs for row in told]
        for row, logprob in zip(told, _logprobs(logits[told], [found[row] for row in told], wanted), strict=True):
            choices[row] = Choice(found[row], logprob)
    return choices


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's greatest and where it first is. By blocks: torch's argmax takes six times as long on a CPU."""
    rows, size = logits.shape
    if logits.is_cuda or size < 2 * _BLOCK:
        best, tokens = logits.max(-1)
        return tokens, best
    whole = size - size % _BLOCK
    blocks = logits[:, :whole].view(rows, -1, _BLOCK)
    greatest = blocks.amax(-1)
    block = greatest.argmax(-1)
    at = torch.arange(rows)
    inside = blocks[at, block]
    tokens, best = block * _BLOCK + inside.argmax(-1), greatest[at, block]
    if whole < size:
        last, place = logits[:, whole:].max(-1)
        tokens, best = torch.where(last > best, place + whole, tokens), torch.maximum(best, last)
    return tokens, best


def _copy(logits: Tensor, rows: Tensor) -> Tensor:
    """These rows in float32, in memory kept from step to step: on a CPU, new pages cost more than all the rest."""
    size = len(rows) * logits.shape[-1]
    kept: Tensor | None = getattr(_scratch, "memory", None)
    if kept is None or kept.device != logits.device or len(kept) < size:
        kept = _scratch.memory = torch.empty(size, dtype=torch.float32, device=logits.device)
    copied = kept[:size].view(len(rows), -1)
    if logits.dtype == copied.dtype:
        return torch.index_select(logits, 0, rows, out=copied)
    return copied.copy_(logits if len(rows) == len(logits) else logits.index_select(0, rows))


def _changed(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The tokens of rows that are drawn, or whose scores change before their likeliest is taken."""
    _edit(scores, draws)
    _constrain(scores, draws)
    tokens, best = _likeliest(scores)
    drawn = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if drawn:
        everyone = len(drawn) == len(draws)
        rows = torch.tensor(drawn, device=scores.device)
        picked = scores if everyone else scores.index_select(0, rows)
        tokens[rows] = _draw(picked, best[rows], [draws[row] for row in drawn])
    return tokens.masked_fill_(~torch.isfinite(best), BROKEN)


def _edit(scores: Tensor, draws: Sequence[Draw]) -> None:
    """Penalties and biases, of the few tokens that have any, in one gather and one scatter for all rows."""
    size = scores.shape[-1]
    places, factors, shifts = [], [], []
    for row, draw in enumerate(draws):
        edits = draw.edits(size)
        if edits.ids.size:
            places.append(edits.ids + row * size)
            factors.append(edits.factors)
            shifts.append(edits.shifts)
    if not places:
        return
    at, factor, shift = (
        torch.from_numpy(np.concatenate(arrays)).to(scores.device) for arrays in (places, factors, shifts)
    )
    flat = scores.view(-1)
    was = flat[at]
    flat[at] = torch.where(was < 0, was * factor, was / factor) + shift


def _constrain(scores: Tensor, draws: Sequence[Draw]) -> None:
    """What a constraint does not allow is out; so is an end id before min_tokens, unless nothing else is allowed."""
    size = scores.shape[-1]
    for row, draw in enumerate(draws):
        ends = draw.forbidden(size)
        if draw.constraint is None:
            if ends:
                scores[row, ends] = -torch.inf
            continue
        allowed = draw.allowed(size)
        if ends and allowed.any():
            without = allowed.copy()
            without[ends] = False
            allowed = without if without.any() else allowed
        # torch.where and not masked_fill, which is far slower on a CPU
        scores[row] = torch.where(torch.from_numpy(allowed).to(scores.device), scores[row], -torch.inf)


def _draw(scores: Tensor, best: Tensor, draws: Sequence[Draw]) -> Tensor:
    """One token a row, by its probability among those that top_k, top_p and min_p leave. `scores` are used up."""
    # A temperature of nearly 0 is a slope of nearly endless: bounded, 0 times it is still 0.
    fields = [(min(1 / draw.sampling.temperature, 1e30), draw.uniform()) for draw in draws]
    slope, number = torch.tensor(fields, dtype=torch.float64, device=scores.device).T
    short = -scores.shape[-1] % _BLOCK
    if short:
        scores = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
    scores.sub_(best[:, None]).mul_(slope.float()[:, None])
    weights = torch.softmax(scores, -1, out=scores)  # in place: on a CPU, memory is what costs
    blocks = weights.view(len(draws), -1, _BLOCK)
    mass = blocks.sum(-1)
    tokens = _search_blocks(blocks, mass, number)
    narrowed = [row for row, draw in enumerate(draws) if draw.narrowed]
    if narrowed:
        rows = torch.tensor(narrowed, device=scores.device)
        total = mass[rows].sum(-1, dtype=torch.float64)
        tokens[rows] = _draw_narrowed(blocks, rows, total, number[rows], [draws[row] for row in narrowed])
    return tokens


def _draw_narrowed(blocks: Tensor, rows: Tensor, total: Tensor, number: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Of these rows. What they keep is nearly always within the few blocks that hold their likeliest."""
    size = blocks[0].numel()
    fields = [(draw.sampling.top_k or size, draw.sampling.top_p, draw.sampling.min_p) for draw in draws]
    limits = _Limits(total, *torch.tensor(fields, dtype=torch.float64, device=blocks.device).T)
    greatest = blocks.amax(-1)[rows]
    which = greatest.topk(min(_BLOCK, greatest.shape[-1]), -1).indices.sort(-1).values
    inside = blocks[rows[:, None], which]
    head = inside.flatten(1).topk(min(_BLOCK, size), -1).values
    count, known = _count(head, size, limits)
    _keep(inside, head, count)
    found = _search_blocks(inside, inside.sum(-1), number)
    tokens = which.gather(-1, found[:, None] // _BLOCK)[:, 0] * _BLOCK + found % _BLOCK
    for row in (~known).nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        whole = blocks[rows[one]]
        for length in (*_HEADS, size):
            head = _falling(whole.flatten(1), min(length, size))
            count, enough = _count(head, size, limits.of(one))
            if enough:
                break
        _keep(whole, head, count)
        tokens[one] = _search_blocks(whole, whole.sum(-1), number[one])
    return tokens


class _Limits(NamedTuple):
    """What rows are narrowed by, and what their weights add up to."""

    total: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def of(self, rows: slice) -> _Limits:
        return _Limits(*(column[rows] for column in self))


def _count(head: Tensor, size: int, limits: _Limits) -> tuple[Tensor, Tensor]:
    """How many of the head, a row's greatest in falling order, are kept, and whether the head is long enough to know.

    As transformers has it: of the top_k, those before which less than top_p of the top_k's mass came; of these, those
    that have min_p of the first; and always the first.
    """
    length = head.shape[-1]
    rank = torch.arange(length, device=head.device)
    in_k = rank < limits.top_k[:, None]
    of_k = torch.where(in_k, head, 0).double()
    cumulative = of_k.cumsum(-1)
    within = limits.top_k <= length
    mass = torch.where(within, cumulative[:, -1], limits.total)
    enough = (
        limits.top_p * mass * (1 - 1e-6)
    )  # float32 weights are sure to so many digits: what is as near has reached it
    kept = (cumulative - of_k < enough[:, None]) & in_k & (of_k >= limits.min_p[:, None] * of_k[:, :1])
    kept[:, 0] = True
    count = kept.sum(-1)
    known = (count < length) & (within | (limits.top_k >= size))
    return count, known | (length == size)


def _keep(blocks: Tensor, head: Tensor, count: Tensor) -> None:
    """Only what weighs as much as the last that is kept; of those that weigh the same, the first that were counted."""
    last = head.gather(-1, count[:, None] - 1)
    torch.where(blocks >= last[:, :, None], blocks, blocks.new_zeros(()), out=blocks)
    after = head.gather(-1, count[:, None].clamp(max=head.shape[-1] - 1))
    tied = (last == after)[:, 0] & (count < head.shape[-1]) & (last[:, 0] > 0)
    for row in tied.nonzero()[:, 0].tolist():
        kept = int((head[row, : int(count[row])] == last[row]).sum())
        flat = blocks[row].view(-1)
        flat[(flat == last[row]).nonzero()[kept:, 0]] = 0


def _search_blocks(blocks: Tensor, mass: Tensor, number: Tensor) -> Tensor:
    """The inverse of the cumulative distribution at each row's number: first which block, then which in it.

    The tokens are taken in vocabulary order and not by probability, so that rounding that swaps two near
    neighbours moves a boundary by as much as the rounding and not by a token's whole share. Added up in float64:
    float32 would lose a vocabulary's tail.
    """
    block, rest = _search(mass, number)
    inside, _ = _search(blocks[torch.arange(len(blocks), device=blocks.device), block], rest)
    return block * _BLOCK + inside


def _search(weights: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Which of a row's weights its number in [0, 1) falls on, and where within that, in [0, 1] again."""
    cumulative = weights.double().cumsum(-1)
    total = cumulative[:, -1]
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding may reach the total
    target = torch.minimum(number * total, below)[:, None]
    # A broken row holds NaNs, and is told of by who called: here it must not lead outside.
    found = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, found).double()
    rest = (target - (cumulative.gather(-1, found) - weight)) / weight
    return found[:, 0], rest[:, 0].clamp(0, 1)


def _greatest(blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest of each row, falling, and where: in as many blocks as have the greatest greatest."""
    count = min(count, blocks[0].numel())
    which = blocks.amax(-1).topk(min(count, blocks.shape[1]), -1).indices
    inside = blocks.gather(1, which[:, :, None].expand(-1, -1, _BLOCK))
    values, place = inside.flatten(1).topk(count, -1)
    return values, which.gather(-1, place // _BLOCK) * _BLOCK + place % _BLOCK


def _falling(weights: Tensor, count: int) -> Tensor:
    """The `count` greatest of each row, falling. numpy selects and sorts far faster than torch does on a CPU."""
    if weights.is_cuda:
        return weights.topk(count, -1).values
    array = weights.numpy()
    if count < array.shape[-1]:
        array = np.partition(array, -count, -1)[:, -count:]
    return torch.from_numpy(np.sort(array, -1)[:, ::-1].copy())


def _logprobs(logits: Tensor, tokens: list[int], wanted: list[int]) -> list[Logprob]:
    """Of the scores as the model has them. Always as many of the likeliest, so that ties fall as they do alone."""
    scores = logits.float()
    total = scores.logsumexp(-1, keepdim=True)
    chosen = scores.gather(-1, torch.tensor(tokens, device=scores.device)[:, None]) - total
    tops: list[list[tuple[int, float]]] = [[] for _ in tokens]
    if any(wanted):
        short = -scores.shape[-1] % _BLOCK
        padded = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
        values, ids = _greatest(padded.view(len(tokens), -1, _BLOCK), MAX_TOP_LOGPROBS)
        tops = [
            sorted(
                (pair for pair in zip(row_ids, row, strict=True) if pair[1] > -torch.inf),
                key=lambda pair: (-pair[1], pair[0]),
            )
            for row_ids, row in zip(ids.tolist(), (values - total).tolist(), strict=True)
        ]
    return [
        Logprob(token, logprob, top[:count])
        for token, logprob, top, count in zip(tokens, chosen[:, 0].tolist(), tops, wanted, strict=True)
    ]
