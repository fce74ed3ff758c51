"""Prompts for measuring: no two alike, so that nothing is found in a cache, and of exactly so many tokens.

Knows a tokenizer's file, or else only how many ids there are.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

_WORDS = re.findall(
    r"\w+",
    """the a this every one lighthouse keeper harbour storm lantern window ship sailor morning evening winter stone
    letter island engine number garden river mountain bridge story answer question teacher child town market
    walked found opened carried wrote watched remembered painted followed measured repaired and or but because
    when while near under above quiet bright broken early distant careful heavy green little""",
)

Prompts = Callable[[str, int], list[int]]  # a name that no other prompt has, and a length


def text(name: str, words: int) -> str:
    """Words without much sense, the same for the same name."""
    return " ".join(random.Random(name).choices(_WORDS, k=words)).capitalize()


def of_words(tokenizer: Path) -> Prompts:
    from tokenizers import Tokenizer

    known = Tokenizer.from_file(str(tokenizer))

    def prompt(name: str, length: int) -> list[int]:
        ids: list[int] = known.encode(text(name, length), add_special_tokens=False).ids  # a word is a token or more
        return ids[:length]

    return prompt


def of_numbers(vocabulary: int) -> Prompts:
    return lambda name, length: random.Random(name).choices(range(vocabulary), k=length)
