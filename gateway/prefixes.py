"""Where a prompt that begins like this one was last answered: hashes of beginnings, a bounded number of them.

Knows prompts as bytes and endpoints as names; no load, no clock.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

SHORTEST, LONGEST = 64, 64 * 1024  # bytes: to compute less anew is quick, and who shares more shares enough
LEAST_SHARED = 0.25  # of a prompt: a greeting in common is nothing to go anywhere for
CAPACITY = 16_384  # beginnings: some 2 MB


def _lengths() -> tuple[int, ...]:
    """Each half as long again: what two prompts share is known to a third."""
    lengths = [SHORTEST]
    while lengths[-1] < LONGEST:
        lengths.append(min(LONGEST, lengths[-1] * 3 // 2))
    return tuple(lengths)


_LENGTHS = _lengths()


class Beginning(NamedTuple):
    length: int
    digest: bytes


class Beginnings(NamedTuple):
    """Of one prompt, the shortest first; none of a short one."""

    of: int  # the prompt's length
    found: list[Beginning]


def beginnings(inputs: Mapping[str, str | bytes | list[int]]) -> Beginnings:
    """Of what a submission gives its pipeline: tools, which templates put first, and messages, or text, or ids."""
    prompt = b"".join(_bytes(inputs[name]) for name in ("tools", "messages", "text", "text_ids") if name in inputs)
    prompt = prompt[:LONGEST]
    found, hashed, start = [], hashlib.blake2b(digest_size=8), 0
    for length in _LENGTHS:
        if length > len(prompt):
            break
        hashed.update(prompt[start:length])
        found.append(Beginning(length, hashed.digest()))
        start = length
    return Beginnings(len(prompt), found)


def _bytes(value: str | bytes | list[int]) -> bytes:
    """Of as much as counts: a prompt may be a megabyte, and pictures far more."""
    head = value[:LONGEST]
    if isinstance(head, list):
        return array("q", head).tobytes()
    return head.encode() if isinstance(head, str) else head


class Prefixes:
    """Which endpoint had a beginning last. What was asked for longest ago is forgotten first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._endpoints: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._endpoints)

    def find(self, prompt: Beginnings) -> str | None:
        """Where the longest beginning was that is known, if that is enough of the prompt."""
        for length, digest in reversed(prompt.found):
            if length < LEAST_SHARED * prompt.of:
                break
            if digest in self._endpoints:
                return self._endpoints[digest]
        return None

    def remember(self, prompt: Beginnings, endpoint: str) -> None:
        for _, digest in prompt.found:
            self._endpoints[digest] = endpoint
            self._endpoints.move_to_end(digest)
        while len(self._endpoints) > self._capacity:
            self._endpoints.popitem(last=False)
