"""Byte pair encoding of one word at a time, by a table that is mapped and not read. Knows no text and no tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_NONE = 1 << 64  # more than any result


class Merges:
    """Byte pair encoding of one word: of all neighbours that may be one token, those that the tokenizer learnt first.

    `pairs` are two ids each, in order, and `results` their rank and the id that they become.
    """

    def __init__(self, table: NDArray[np.uint64], *, byte_level: bool, whole_words: bool) -> None:
        """`byte_level`: each letter stands for a byte, and what has none is left out; else bytes are tokens. Where
        `whole_words`, a word that is a token is that one."""
        self._byte_level = byte_level
        self._whole_words = whole_words
        self._pairs, self._results = table

    @classmethod
    def load(cls, file: Path, *, byte_level: bool, whole_words: bool) -> Merges:
        return cls(np.load(file, mmap_mode="r"), byte_level=byte_level, whole_words=whole_words)

    def word(self, word: str, ids: Mapping[str, int]) -> list[int]:
        if self._whole_words and word in ids:
            return [ids[word]]
        spelt = [token_id for char in word for token_id in self._char(char, ids)]
        found = [self._result(*pair) for pair in itertools.pairwise(spelt)]
        while found and (best := min(found)) != _NONE:
            at = found.index(best)
            spelt[at : at + 2] = [best & 0xFFFFFFFF]
            del found[at]
            for place in (at - 1, at):
                if 0 <= place < len(found):
                    found[place] = self._result(spelt[place], spelt[place + 1])
        return spelt

    def _char(self, char: str, ids: Mapping[str, int]) -> list[int]:
        """A letter of a byte that a byte-level vocabulary lacks (SmolLM2's lacks 0xF1) is left out, as it leaves it."""
        if char in ids:
            return [ids[char]]
        return [] if self._byte_level else [ids[f"<0x{byte:02X}>"] for byte in char.encode()]

    def _result(self, left: int, right: int) -> int:
        """Rank and id in one number, so that the least is the first learnt."""
        pair = np.uint64(left << 32 | right)
        at = int(np.searchsorted(self._pairs, pair))
        return int(self._results[at]) if at < len(self._pairs) and self._pairs[at] == pair else _NONE


def table_of(merges: Sequence[str | Sequence[str]], ids: Mapping[str, int]) -> NDArray[np.uint64]:
    """Of a tokenizer.json's merges, the first learnt first; each is two tokens, in a list or with a space between."""
    pairs, results = [], []
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs.append(ids[left] << 32 | ids[right])
        results.append(rank << 32 | ids[left + right])
    table = np.array([pairs, results], np.uint64)
    return np.ascontiguousarray(table[:, np.argsort(table[0], kind="stable")])
