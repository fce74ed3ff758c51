"""Which endpoint takes a request of one pipeline, and which are left alone for a while. Pure: it is told the time.

By prefix, as long as the endpoint that had the prompt's beginning is not much busier than the idlest; else the idlest.
An endpoint that loses a request, or fails several in a row, is ejected for a pause; then one request is its probe, and
brings it back or ejects it for twice as long. Whoever loses requests without a word to their clients has them asked
again (`gateway.retry`), so that a probe costs nobody an answer.

Knows no connection: which endpoints can answer at all, and how much each has to do, it is told as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.prefixes import Beginnings, Prefixes

SLACK, FACTOR = 4, 1.5  # a prefix's endpoint may have so many requests more than 1.5 times the idlest one's
FAILURES = 3  # in a row
PAUSE_S, MAX_PAUSE_S = 1.0, 60.0


@dataclass(eq=False)
class Route:
    """One request's: whoever got it says once what became of it."""

    endpoint: str


@dataclass
class _Standing:
    """What is known of one endpoint."""

    failures: int = 0  # in a row
    ejections: int = 0  # in a row
    until: float | None = None  # when its probe is due, while it is ejected
    probe: Route | None = None
    chosen: int = 0  # by number: of those that are equal the one longest ago


class Router:
    """For one pipeline. `now` is of any clock that does not go back."""

    def __init__(self, endpoints: Sequence[str], prefixes: Prefixes | None = None) -> None:
        self._standings = {endpoint: _Standing() for endpoint in endpoints}
        self._prefixes = prefixes or Prefixes()
        self._number = 0

    def choose(self, prompt: Beginnings, loads: Mapping[str, int], now: float) -> Route | None:
        """One of those that can answer, which are the keys of `loads`; None if none can.

        Where all of them are ejected, all are as good as any: a request is never refused for the sake of a pause.
        """
        if not loads:
            return None
        route = Route(self._due(loads, now) or self._best(prompt, loads))
        standing = self._standings[route.endpoint]
        if standing.until is not None and standing.until <= now and standing.probe is None:
            standing.probe = route
        self._number += 1
        standing.chosen = self._number
        self._prefixes.remember(prompt, route.endpoint)
        return route

    def ejected(self, endpoint: str) -> bool:
        return self._standings[endpoint].until is not None

    def succeeded(self, route: Route) -> None:
        standing = self._standings[route.endpoint]
        if standing.until is None:
            standing.failures = 0
        elif standing.probe is route:
            self._standings[route.endpoint] = _Standing(chosen=standing.chosen)

    def failed(self, route: Route, now: float) -> bool:
        """It answered that it could not; answers whether that ejected the endpoint."""
        standing = self._standings[route.endpoint]
        standing.failures += 1
        return (standing.failures >= FAILURES or standing.probe is route) and self._eject(route, now)

    def lost(self, route: Route, now: float) -> bool:
        """What should have answered is gone; answers whether that ejected the endpoint."""
        return self._eject(route, now)

    def withdrawn(self, route: Route) -> None:
        """It ended before it could tell anything of its endpoint."""
        standing = self._standings[route.endpoint]
        if standing.probe is route:
            standing.probe = None

    def _due(self, loads: Mapping[str, int], now: float) -> str | None:
        """An endpoint whose pause is over, and that nobody tries yet."""
        for endpoint in loads:
            standing = self._standings[endpoint]
            if standing.until is not None and standing.until <= now and standing.probe is None:
                return endpoint
        return None

    def _best(self, prompt: Beginnings, loads: Mapping[str, int]) -> str:
        able = {endpoint: load for endpoint, load in loads.items() if not self.ejected(endpoint)} or loads
        least = min(able.values())
        home = self._prefixes.find(prompt)
        if home is not None and home in able and able[home] <= SLACK + FACTOR * least:
            return home
        return min(able, key=lambda endpoint: (able[endpoint], self._standings[endpoint].chosen))

    def _eject(self, route: Route, now: float) -> bool:
        """What comes of requests sent before an ejection says nothing new: all of a lost lane's come at once."""
        standing = self._standings[route.endpoint]
        if standing.until is not None and standing.probe is not route:
            return False
        standing.until = now + min(MAX_PAUSE_S, PAUSE_S * 2**standing.ejections)
        standing.ejections = min(standing.ejections + 1, 16)
        standing.failures, standing.probe = 0, None
        return True
