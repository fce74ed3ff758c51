"""What interleaved rounds say: rates of streams that run together, medians, ratios by round. Pure arithmetic.

Does not know who was measured, nor how.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.report import median


@dataclass(frozen=True)
class Measure:
    """So many streams, each of a prompt of `prompt` tokens and of `tokens` decoded; 0 of these: the prompt alone."""

    name: str
    streams: int
    prompt: int
    tokens: int


Series = Mapping[str, Sequence[float]]  # of one peer: a measure's rates, one a round


def together(streams: Sequence[Sequence[float]], weights: Sequence[float] | None = None) -> float:
    """Tokens a second of streams that run at once, in the time in which all of them decode.

    That time goes from the last stream's first token to the first stream's last, so that no prompt is in it. A stream
    is the times at which something arrived, each time `weights` tokens. Streams that hardly overlap are refused: what
    is left of them is too little, or nothing.
    """
    if not all(len(times) > 1 for times in streams):
        raise ValueError("a stream of fewer than two tokens has no rate")
    start, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    inside = [max(0, bisect_right(times, end) - bisect_right(times, start)) for times in streams]
    if 4 * min(inside) < min(len(times) - 1 for times in streams):
        raise ValueError("the streams did not run together: decode longer answers, or fewer streams")
    return sum(count * weight for count, weight in zip(inside, weights or [1.0] * len(streams), strict=True)) / (
        end - start
    )


def one_by_one(streams: Sequence[Sequence[float]]) -> float:
    """Tokens a second of streams that run one after the other, without the prompts between them."""
    return sum(len(times) - 1 for times in streams) / sum(times[-1] - times[0] for times in streams)


def medians(series: Series) -> dict[str, float]:
    return {name: median(rates) for name, rates in series.items()}


def ratios(ours: Series, theirs: Series) -> dict[str, float]:
    """The median over the rounds of ours to theirs, of each measure that both have: more than 1 is faster."""
    return {name: median(values) for name, values in _by_round(ours, theirs)}


def spreads(ours: Series, theirs: Series) -> dict[str, tuple[float, float]]:
    """The lowest and the highest round's ratio."""
    return {name: (min(values), max(values)) for name, values in _by_round(ours, theirs)}


def _by_round(ours: Series, theirs: Series) -> Iterator[tuple[str, list[float]]]:
    for name, rates in ours.items():
        if name in theirs:
            yield name, [mine / other for mine, other in zip(rates, theirs[name], strict=True)]
