"""Which models leave memory when another needs it: `python -m bench.eviction [--seed N] [--rounds N] [--json]`.

Seconds spent reloading, by the lifecycle's own rule (`gateway.lifecycle.eviction`), by LRU, by the shortest keep-alive
first (Ollama's rule), and by two that know the future. Drawn traces, no server, no clock: a load takes no time of the
trace, and nobody is unloaded but for another, which is kind to the rules compared with: with expiry they reload more.

How traces are drawn, and why, without regard to any rule:

- 40 models of 0.1 to 16 GB, log-uniformly: from 135 million parameters at 8 bits to 8 billion at 16.
- A load takes 1 to 3 s to start a process and import, plus the bytes at about 1 GB/s, which varies by a factor of two
  and more between formats and disks (log-normal, sigma 0.7); one in five also compiles, for 10 to 60 s.
- Popularity is Zipf, of skew 0.6, 0.9 and 1.2, in an order that size has no part in.
- People come in sessions, a Poisson process of one a minute in all, of 5 requests on average, half a minute apart.
- Half of the models have hours: their rate follows a sine of one day, with a peak of their own. Every day a tenth of
  the models trade their popularity with others.
- Memory is 25 and 45 % of what all models need, but for the largest there is always room. Seven days; all counts are
  after the first, in which memory fills.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench import report
from gateway.lifecycle.budget import Memory
from gateway.lifecycle.eviction import Frequency, Option, choose
from gateway.lifecycle.states import Limits

MODELS = 40
SKEWS = (0.6, 0.9, 1.2)
MEMORIES = (0.25, 0.45)
DAY_S = 86_400.0
DAYS = 7
SESSION_EVERY_S = 60.0
SESSION_REQUESTS = 5
SESSION_GAP_S = 30.0
KEEP_ALIVES = ((60.0, 10), (300.0, 70), (1800.0, 20))  # seconds, weight: most leave the default


@dataclass(frozen=True)
class Model:
    """Its number is its place in the list of all."""

    bytes: int
    load_s: float
    keep_alive: float
    peak: float | None  # of its day, in seconds; None: no hours


@dataclass(frozen=True)
class Trace:
    """`next` is, for each request, when its model is asked for again."""

    models: Sequence[Model]
    requests: Sequence[tuple[float, int]]
    memory: int
    next: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        after: dict[int, float] = {}
        for now, model in reversed(self.requests):
            self.next.append(after.get(model, math.inf))
            after[model] = now
        self.next.reverse()


def draw(seed: int, skew: float, part: float) -> Trace:
    """One trace, the same for every rule."""
    dice = random.Random(f"{seed} {skew} {part}")
    models = [_model(dice) for _ in range(MODELS)]
    weights = [1 / rank**skew for rank in range(1, MODELS + 1)]
    dice.shuffle(weights)
    requests: list[tuple[float, int]] = []
    now, day = 0.0, 0
    while (now := now + dice.expovariate(1 / SESSION_EVERY_S)) < DAYS * DAY_S:
        if now // DAY_S > day:
            day += 1
            moved = dice.sample(range(MODELS), MODELS // 10)
            for one, other in zip(moved, dice.sample(range(MODELS), len(moved)), strict=True):
                weights[one], weights[other] = weights[other], weights[one]
        rates = [weight * _hour(model, now) for weight, model in zip(weights, models, strict=True)]
        model = dice.choices(range(MODELS), rates)[0]
        at = now
        while True:
            requests.append((at, model))
            if dice.random() < 1 / SESSION_REQUESTS:
                break
            at += dice.expovariate(1 / SESSION_GAP_S)
    total = sum(model.bytes for model in models)
    return Trace(models, sorted(requests), max(int(total * part), max(model.bytes for model in models)))


def _model(dice: random.Random) -> Model:
    size = math.exp(dice.uniform(math.log(0.1e9), math.log(16e9)))
    load_s = dice.uniform(1, 3) + size / (1e9 * dice.lognormvariate(0, 0.7))
    load_s += dice.uniform(10, 60) if dice.random() < 0.2 else 0
    keep_alive = dice.choices([s for s, _ in KEEP_ALIVES], [weight for _, weight in KEEP_ALIVES])[0]
    return Model(int(size), load_s, keep_alive, dice.uniform(0, DAY_S) if dice.random() < 0.5 else None)


def _hour(model: Model, now: float) -> float:
    return 1.0 if model.peak is None else 1 + 0.95 * math.cos((now - model.peak) / DAY_S * 2 * math.pi)


class Rule:
    """Who leaves; `order` is the resident models, whose last use was earliest first."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def used(self, number: int, now: float, model: int) -> None:
        """Request `number` of the trace has come."""

    def victims(self, now: float, residents: Sequence[int], shortage: int) -> list[int]:
        raise NotImplementedError

    def first(self, ranked: Sequence[int], shortage: int) -> list[int]:
        """As many of the first as it takes."""
        chosen = []
        for model in ranked:
            if shortage <= 0:
                break
            chosen.append(model)
            shortage -= self.trace.models[model].bytes
        return chosen


class Lru(Rule):
    def victims(self, now: float, residents: Sequence[int], shortage: int) -> list[int]:
        return self.first(residents, shortage)


class KeepAlive(Rule):
    """Ties, which most are, go to the least recently used."""

    def victims(self, now: float, residents: Sequence[int], shortage: int) -> list[int]:
        return self.first(sorted(residents, key=lambda model: self.trace.models[model].keep_alive), shortage)


class Ours(Rule):
    def __init__(self, trace: Trace, half_life_s: float = Limits(Memory()).half_life_s) -> None:
        super().__init__(trace)
        self._frequencies = [Frequency(half_life_s) for _ in trace.models]

    def used(self, number: int, now: float, model: int) -> None:
        self._frequencies[model].hit(now)

    def victims(self, now: float, residents: Sequence[int], shortage: int) -> list[int]:
        models = self.trace.models
        options = [
            Option(
                str(model), True, Memory(models[model].bytes), self._frequencies[model].rate(now), models[model].load_s
            )
            for model in residents
        ]
        return [int(option.name) for option in choose(options, Memory(shortage), Memory(self.trace.memory))]


class Clairvoyant(Rule):
    """Belady's, for unequal bytes and costs: lowest first `worth`, of seconds until the next use, bytes and cost."""

    def __init__(self, trace: Trace, worth: Callable[[float, int, float], float]) -> None:
        super().__init__(trace)
        self._worth = worth
        self._next = [math.inf] * len(trace.models)

    def used(self, number: int, now: float, model: int) -> None:
        self._next[model] = self.trace.next[number]

    def victims(self, now: float, residents: Sequence[int], shortage: int) -> list[int]:
        models = self.trace.models

        def worth(model: int) -> float:
            return self._worth(self._next[model] - now, models[model].bytes, models[model].load_s)

        return self.first(sorted(residents, key=worth), shortage)


def reload_seconds(trace: Trace, rule: Rule) -> float:
    """Of the whole trace but its first day."""
    resident: dict[int, None] = {}  # in the order of last use
    free = trace.memory
    seconds = 0.0
    for number, (now, model) in enumerate(trace.requests):
        rule.used(number, now, model)
        if model in resident:
            del resident[model]
        else:
            shortage = trace.models[model].bytes - free
            if shortage > 0:
                for victim in rule.victims(now, list(resident), shortage):
                    del resident[victim]
                    free += trace.models[victim].bytes
            free -= trace.models[model].bytes
            assert free >= 0
            seconds += trace.models[model].load_s if now >= DAY_S else 0.0
        resident[model] = None
    return seconds


def bound(trace: Trace) -> float:
    """Fewer reload seconds than this no rule can have (PFOO-L, Berger and others 2018).

    To keep a model until its next use saves its load and takes its bytes for that long. The memory over all requests is
    given to what saves most for it, as if it could be had in pieces: a bound, which nothing need reach.
    """
    last: dict[int, int] = {}
    saves: list[tuple[float, float, float]] = []  # seconds for a byte and step, bytes and steps, seconds
    total, saved = 0.0, 0.0
    first = next(number for number, (now, _) in enumerate(trace.requests) if now >= DAY_S)
    for number, (now, model) in enumerate(trace.requests):
        if now >= DAY_S:
            total += trace.models[model].load_s
            if model in last:
                space = float((number - max(last[model], first)) * trace.models[model].bytes)
                load_s = trace.models[model].load_s
                saves.append((load_s / space if space else math.inf, space, load_s))
        last[model] = number
    space_left = float(trace.memory) * (len(trace.requests) - first)
    for density, space, seconds in sorted(saves, reverse=True):
        if space > space_left:
            saved += density * space_left
            break
        saved += seconds
        space_left -= space
    return total - saved


RULES: dict[str, Callable[[Trace], Rule]] = {
    "lru": Lru,
    "keep-alive": KeepAlive,
    "ours": Ours,
    "belady (farthest)": lambda trace: Clairvoyant(trace, lambda ahead, size, cost: -ahead),
    "belady (cost)": lambda trace: Clairvoyant(trace, lambda ahead, size, cost: cost / (size * max(ahead, 1e-9))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2, help="traces of each kind (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the last line alone")
    arguments = parser.parse_args()
    sums = dict.fromkeys([*RULES, "bound"], 0.0)
    rows = []
    for skew in SKEWS:
        for part in MEMORIES:
            here = dict.fromkeys(sums, 0.0)
            for number in range(arguments.rounds):
                trace = draw(arguments.seed * 1000 + number, skew, part)
                for name, rule in RULES.items():
                    here[name] += reload_seconds(trace, rule(trace))
                here["bound"] += bound(trace)
            for name, seconds in here.items():
                sums[name] += seconds
            rows.append((f"skew {skew:g}, memory {part:.0%}", *(seconds / 3600 for seconds in here.values())))
    belady = min(sums["belady (farthest)"], sums["belady (cost)"])
    result = {
        "reload_seconds_vs_lru": sums["ours"] / sums["lru"],
        "reload_seconds_vs_keep_alive": sums["ours"] / sums["keep-alive"],
        "vs_belady": sums["ours"] / belady,
        "lru_vs_belady": sums["lru"] / belady,
        "vs_bound": sums["ours"] / sums["bound"],
        "seed": arguments.seed,
        "rounds": arguments.rounds,
    }
    if not arguments.json:
        print(report.table(["hours of reloading", *sums], rows))
        print()
    print(report.json_line(result))


if __name__ == "__main__":
    main()
