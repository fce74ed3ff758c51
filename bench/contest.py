"""Peers measured in turns: warmed up, then round by round, each measure on all of them before the next.

A peer that fails is left out with its reason and the others go on. Knows no engine; not what the numbers mean.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.peers import Peer, PeerError
from bench.prompts import Prompts
from bench.report import shown
from bench.rounds import Measure

SETTLE_S = 900.0


@dataclass
class Contest:
    """`series` holds the rates of each peer by measure, one a round; `failed` why one is not there."""

    measures: Sequence[Measure]
    prompts: Prompts
    peers: dict[str, Peer] = field(default_factory=dict)
    series: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, start: Callable[[], Peer], **load: Any) -> None:
        """Starts a peer and has it load its model; `start` may raise a PeerError too."""
        try:
            peer = self.peers[name] = start()
            peer.load(**load)
        except PeerError as error:
            self._drop(name, str(error))

    def warm(self, settling: Sequence[str]) -> None:
        """Every measure once. `settling` build something meanwhile, perhaps: waits for it, and once more."""
        for name in list(self.peers):
            say(f"{name}: warming up")
            self._once(name, "warm")
        for name in [name for name in settling if name in self.peers]:
            say(f"{name}: waiting until it builds nothing in the background")
            if not self.peers[name].settle(SETTLE_S):
                say(f"{name}: still busy after {SETTLE_S:.0f} s, measured all the same")
            self._once(name, "warm again")

    def keep_faster(self, name: str, variants: Sequence[str]) -> None:
        """Of several ways to run one peer the fastest over all measures stays, called `name`."""
        logs: dict[str, float] = {}
        for variant in [variant for variant in variants if variant in self.peers]:
            rates = self._once(variant, "choice")
            if rates:
                logs[variant] = sum(map(math.log, rates)) / len(rates)
        for variant in [variant for variant in variants if variant in self.peers]:
            if variant == max(logs, key=lambda key: logs[key]):
                self.peers[name] = self.peers.pop(variant)
            else:
                self.peers.pop(variant).close()
        if not logs:
            self.failed[name] = "; ".join(self.failed.pop(variant) for variant in variants if variant in self.failed)

    def run(self, rounds: int) -> None:
        """Every other round in reverse order."""
        self.series = {name: {measure.name: [] for measure in self.measures} for name in self.peers}
        for turn in range(rounds):
            for measure in self.measures:
                names = list(self.peers)
                for name in names if turn % 2 else reversed(names):
                    with self._or_dropped(name):
                        rate = self.peers[name].measure(measure, self.prompts, f"round {turn} {measure.name}")
                        self.series[name][measure.name].append(rate)
                rates = ", ".join(f"{name} {shown(self.series[name][measure.name][-1])}" for name in self.peers)
                say(f"round {turn + 1} of {rounds}, {measure.name}: {rates}")

    def close(self) -> None:
        for peer in self.peers.values():
            peer.close()

    def _once(self, name: str, word: str) -> list[float]:
        rates = []
        with self._or_dropped(name):
            for measure in self.measures:
                rates.append(self.peers[name].measure(measure, self.prompts, f"{word} {measure.name}"))
        return rates if name in self.peers else []

    @contextlib.contextmanager
    def _or_dropped(self, name: str) -> Iterator[None]:
        try:
            yield
        except PeerError as error:
            self._drop(name, str(error))

    def _drop(self, name: str, reason: str) -> None:
        say(f"{name} is left out: {reason}")
        self.failed[name] = reason
        self.series.pop(name, None)
        if peer := self.peers.pop(name, None):
            peer.close()


def say(line: str) -> None:
    print(line, file=sys.stderr)
