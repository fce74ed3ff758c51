"""Texts to a tokenizer's ids and back, to the character: for a model that speaks text, in a product that moves ids.

For byte-level tokenizers, whose ids add up to the text however it was cut. No special token is made of a text: what
looks like one is letters. A character whose bytes a vocabulary lacks becomes U+FFFD. Knows no model, and no engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from pipelines.detokenizer import REPLACEMENT
from pipelines.vocabulary import letter_bytes

_PROBE = "a  b\té\u0301\r\n日本 😀<|x|> "
_LONGEST = 16  # of a word that is waited for: where words have no spaces between them, they would have no end
_LETTERS = {byte: letter for letter, byte in letter_bytes().items()}


class Spelling:
    """Raises ValueError for a tokenizer of another kind."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._words = tokenizer.pre_tokenizer
        self._model = tokenizer.model
        decoder = tokenizer.decoder
        known = decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"
        if not known or self._words is None or self.text(self.ids(_PROBE)) != _PROBE:
            raise ValueError("the tokenizer is not byte-level: what a model says in text cannot be put into its ids")

    @classmethod
    def load(cls, home: Path) -> Spelling:
        file = home / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"{file} is missing: text is counted, and travels, in its ids")
        return cls(Tokenizer.from_file(str(file)))

    def ids(self, text: str) -> list[int]:
        return [number for word in self.words(text) for number in self.word(word)]

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def words(self, text: str) -> Iterator[str]:
        """The parts of the text that are spelt each by itself."""
        for _, (start, end) in self._words.pre_tokenize_str(text):
            yield text[start:end]

    def word(self, word: str) -> list[int]:
        return self._spelt(word) or [
            number for char in word for number in self._spelt(char) or self._spelt(REPLACEMENT)
        ]

    def _spelt(self, word: str) -> list[int]:
        """Nothing, if the vocabulary cannot."""
        letters = "".join(_LETTERS[byte] for byte in word.encode())
        tokens = self._model.tokenize(letters)
        return [token.id for token in tokens] if "".join(token.value for token in tokens) == letters else []


class Spelled:
    """The ids of one text that arrives in pieces: nearly as few as of the whole, for a word is waited for."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._pending = ""

    def push(self, piece: str) -> list[int]:
        """What this piece settles: all but the last word, which may go on."""
        words = list(self._spelling.words(self._pending + piece))
        self._pending = words.pop() if words and len(words[-1]) <= _LONGEST else ""
        return [number for word in words for number in self._spelling.word(word)]

    def finish(self) -> list[int]:
        pending, self._pending = self._pending, ""
        return self._spelling.ids(pending)
