"""How much one client may ask for: requests a minute, and requests at a time. What the headers say of it is OpenAI's.

Pure but for the clock, which is given. Knows no HTTP and no keys. Counts in whole numbers: a bucket's level is in
units of which a nanosecond brings `requests_per_minute` and a request takes a minute's nanoseconds, so nothing is
ever rounded away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_MINUTE = 60_000_000_000  # nanoseconds, and what one request takes of a bucket
MAX_LIMIT = 1_000_000_000


@dataclass(frozen=True)
class Limits:
    """What one client may; 0 is no limit."""

    requests_per_minute: int = 0
    concurrency: int = 0


UNLIMITED = Limits()


@dataclass(frozen=True)
class Refusal:
    """Why a request may not begin now, and when to ask again."""

    message: str
    wait_ms: int


class Bucket:
    """Lets `per_minute` requests pass each minute, as many of them at once as it has saved up, a minute's at most."""

    def __init__(self, per_minute: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._full = per_minute * _MINUTE
        self._level = self._full
        self._at = clock()

    def take(self) -> bool:
        self._refill()
        if self._level < _MINUTE:
            return False
        self._level -= _MINUTE
        return True

    def remaining(self) -> int:
        self._refill()
        return self._level // _MINUTE

    def next_ms(self) -> int:
        """Until one request may pass; 0 if one may now."""
        self._refill()
        return self._until(_MINUTE)

    def reset_ms(self) -> int:
        """Until it is full again."""
        self._refill()
        return self._until(self._full)

    def _until(self, level: int) -> int:
        return max(0, -(-(level - self._level) // (self.per_minute * 1_000_000)))

    def _refill(self) -> None:
        now = self._clock()
        if now > self._at:  # a clock that goes back takes nothing away
            self._level = min(self._full, self._level + (now - self._at) * self.per_minute)
            self._at = now


class Limiter:
    """One client's limits and what it has used of them. Each `begin` that is not refused is `end`ed once."""

    def __init__(self, limits: Limits, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self.limits = limits
        self.running = 0
        self._bucket = self._new_bucket()

    def change(self, limits: Limits) -> None:
        """Other limits from now on. What is running goes on, and counts; a new rate begins with a full bucket."""
        if limits.requests_per_minute != self.limits.requests_per_minute:
            self.limits = limits
            self._bucket = self._new_bucket()
        self.limits = limits

    def begin(self) -> Refusal | None:
        """Takes a place, or says why there is none; a request that is refused takes nothing."""
        concurrency = self.limits.concurrency
        if concurrency and self.running >= concurrency:
            return Refusal(f"Rate limit reached: {concurrency} requests of this key at a time.", 1000)
        if self._bucket and not self._bucket.take():
            per_minute = self._bucket.per_minute
            return Refusal(f"Rate limit reached: {per_minute} requests a minute of this key.", self._bucket.next_ms())
        self.running += 1
        return None

    def end(self) -> None:
        self.running -= 1

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's, of the rate; none where there is no rate."""
        if not self._bucket:
            return []
        return [
            (b"x-ratelimit-limit-requests", str(self._bucket.per_minute).encode()),
            (b"x-ratelimit-remaining-requests", str(self._bucket.remaining()).encode()),
            (b"x-ratelimit-reset-requests", duration(self._bucket.reset_ms()).encode()),
        ]

    def _new_bucket(self) -> Bucket | None:
        per_minute = self.limits.requests_per_minute
        return Bucket(per_minute, self._clock) if per_minute else None


def duration(ms: int) -> str:
    """As OpenAI writes it, never shorter than it is: 20ms, 1s, 6m0s, 1h0m0s."""
    if ms < 1000:
        return f"{ms}ms" if ms else "0s"
    minutes, seconds = divmod(-(-ms // 1000), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{seconds}s"
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
