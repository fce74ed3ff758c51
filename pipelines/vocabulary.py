"""A tokenizer's tokens as plain data: all that reading a model's ids needs of it, and what spelling a text does.

`tokenizers` takes 3 s for the tokenizer.json of 262,144 tokens, most of it for the merges, and llguidance 6, both under
the GIL. So what they read is kept beside that file as JSON and an array, which take 0.1 s: the tokens, the decoder, and
the merges of a tokenizer whose text is spelt here as it spells it itself, which is tried before they are kept.

Written by whoever pulls a folder, or by the first who misses it. Knows no stage and no structure.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:  # a gateway searches a vocabulary, and postprocess reads one, without these
    from tokenizers import Tokenizer
    from tokenizers.decoders import Decoder

    from pipelines.merges import Merges

log = logging.getLogger(__name__)

TOKENIZER, KEPT = "tokenizer.json", "kept"
_VERSION = 1
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PROBE = '{"name": "Ünïcode", "tags": [1, -2.5e10, null, true]}\n\tdef f(x):  # 日本語 😀\r\n    return x**2 '
_PROBES = 100  # of random tokens side by side


@dataclass(frozen=True)
class Vocabulary:
    tokens: Sequence[str | None]  # by id
    special: frozenset[str]  # contents that an answer's text leaves out
    added: frozenset[int]
    whole: Tokenizer | Path  # the tokenizer, or its file
    skeleton: Tokenizer  # all of it but its tokens
    spelling: Mapping[str, bool] | None = None  # how `Merges` spells; None where the tokenizer itself is to
    table: Path | None = None  # of its merges

    @classmethod
    def load(cls, home: Path) -> Vocabulary:
        """Of a prepared folder. Raises what `tokenizers` raises of a file that it cannot read."""
        return cls.kept(home) or write(home)

    @classmethod
    def kept(cls, home: Path) -> Vocabulary | None:
        """If it has been before."""
        try:
            return _read(home)
        except Exception:  # whatever is wrong with it, it can be made again
            return None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """Of a tokenizer that is loaded already."""
        return cls(_tokens(tokenizer), _special(tokenizer), _added(tokenizer), tokenizer, tokenizer)

    def token(self, token_id: int) -> str | None:
        return self.tokens[token_id] if 0 <= token_id < len(self.tokens) else None

    @property
    def decoder(self) -> Decoder | None:
        decoder: Decoder | None = self.skeleton.decoder
        return decoder

    @cached_property
    def merges(self) -> Merges | None:
        if self.spelling is None or self.table is None:
            return None
        from pipelines.merges import Merges

        try:
            return Merges.load(self.table, **self.spelling)
        except (OSError, ValueError) as error:
            log.warning(
                "the tokenizer itself spells, which is slower to load: %s cannot be read: %s", self.table, error
            )
            return None

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: token_id for token_id, token in enumerate(self.tokens) if token is not None}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The whole of it: seconds, where it is large."""
        return _tokenizer(self.whole) if isinstance(self.whole, Path) else self.whole

    def spelt(self, text: str) -> list[int]:
        """The ids of a text, wherever in an answer it stands; what looks like a special token is letters."""
        assert self.merges
        return [token_id for word in self._words(text) for token_id in self.merges.word(word, self.ids)]

    def _words(self, text: str) -> Iterator[str]:
        normalizer, splitter = self.skeleton.normalizer, self.skeleton.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer else text
        yield from (word for word, _ in splitter.pre_tokenize_str(text)) if splitter else (text,)

    def bytes(self) -> list[bytes]:
        """What each token is in a text, of a vocabulary that spells; nothing where there is no token."""
        letters = letter_bytes()
        byte_level = self.spelling is not None and self.spelling["byte_level"]

        def one(token_id: int, token: str | None) -> bytes:
            if token is None or token_id in self.added:
                return (token or "").encode()
            if byte_level:
                return bytes(letters[letter] for letter in token)
            if token.startswith("<0x") and (byte := _BYTE.fullmatch(token)):
                return bytes([int(byte[1], 16)])
            return token.replace("\u2581", " ").encode()

        return [one(token_id, token) for token_id, token in enumerate(self.tokens)]


def letter_bytes() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, the wrong way round (openai/gpt-2, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def write(home: Path) -> Vocabulary:
    """Reads the tokenizer itself, which takes its time, and keeps what it says. A folder that cannot be written in is
    read so every time."""
    file, place = home / TOKENIZER, _place(home)
    whole = _tokenizer(file)
    told = orjson.loads(file.read_bytes())
    plain = {
        "tokens": _tokens(whole),
        "special": sorted(_special(whole)),
        "added": sorted(_added(whole)),
        "skeleton": {**told, "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}},
        "spelling": _spelling(told),
    }
    try:
        _skeleton(plain)
    except Exception as error:  # `tokenizers` has no other name for what it cannot read
        log.warning("%s is read anew by every stage: without its tokens it cannot be read: %s", file, error)
        return Vocabulary.of(whole)
    try:
        place.parent.mkdir(exist_ok=True)
        for old in place.parent.glob("vocabulary-*"):
            old.unlink(missing_ok=True)
        if plain["spelling"]:
            _write_table(place.with_suffix(".npy"), told["model"])
            if not _spells_as(whole, _vocabulary(plain, whole, place)):
                plain["spelling"] = None
        _replace(place, lambda fresh: fresh.write_bytes(orjson.dumps(plain)))
    except OSError as error:
        log.warning("%s is read anew by every stage: what it says cannot be kept: %s", file, error)
        plain["spelling"] = None
    return _vocabulary(plain, whole, place)


def text_of(home: Path) -> str:
    """JSON in which every token stands as a string, and which is soon read: to search it. Empty without a tokenizer."""
    file = home / TOKENIZER
    if not file.exists():
        return ""
    place = _place(home)
    return (place if place.exists() else file).read_text(encoding="utf-8")


def _tokenizer(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))


def _read(home: Path) -> Vocabulary:
    place = _place(home)
    return _vocabulary(orjson.loads(place.read_bytes()), home / TOKENIZER, place)


def _vocabulary(plain: Mapping[str, Any], whole: Tokenizer | Path, place: Path) -> Vocabulary:
    tokens, special, added = plain["tokens"], frozenset(plain["special"]), frozenset(plain["added"])
    return Vocabulary(tokens, special, added, whole, _skeleton(plain), plain["spelling"], place.with_suffix(".npy"))


def _skeleton(plain: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(plain["skeleton"]))


def _place(home: Path) -> Path:
    """Another one when the tokenizer's file is. In a folder of its own: a pull vouches for the files beside it."""
    stat = (home / TOKENIZER).stat()
    return home / KEPT / f"vocabulary-{_VERSION}-{stat.st_size:x}-{stat.st_mtime_ns:x}.json"


def _write_table(place: Path, model: Mapping[str, Any]) -> None:
    import numpy as np

    from pipelines.merges import table_of

    table = table_of(model["merges"], model["vocab"])
    _replace(place, lambda fresh: np.save(fresh, table))


def _replace(place: Path, write: Callable[[Path], object]) -> None:
    fresh = place.with_stem(f".{os.getpid()}")
    try:
        write(fresh)
        os.replace(fresh, place)
    finally:
        fresh.unlink(missing_ok=True)


def _tokens(tokenizer: Tokenizer) -> list[str | None]:
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return [tokenizer.id_to_token(token_id) for token_id in range(size)]


def _special(tokenizer: Tokenizer) -> frozenset[str]:
    return frozenset(added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special)


def _added(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(tokenizer.get_added_tokens_decoder())


def _spelling(told: dict[str, Any]) -> dict[str, bool] | None:
    """Of a tokenizer that can be spelt by here: byte pairs, and each token by itself what it is in a text."""
    model, decoder = told["model"], json.dumps(told.get("decoder"))
    if model.get("type") != "BPE" or any(
        model.get(other) for other in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        return None
    byte_level = '"ByteLevel"' in decoder
    fallback = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    if not byte_level and not (fallback and '"ByteFallback"' in decoder):
        return None
    return {"byte_level": byte_level, "whole_words": bool(model.get("ignore_merges"))}


def _spells_as(whole: Tokenizer, ours: Vocabulary) -> bool:
    """Tried: on a text of all kinds, and on tokens of its own side by side. And whether that gives the text again: one
    that sets a space before it does not, and what is forced within an answer must not have one."""
    dice = random.Random(0)
    texts = [token for token_id, token in enumerate(ours.tokens) if token and token_id not in ours.added]
    try:
        pieces = ours.bytes()
        by_token = dict(zip(ours.tokens, pieces, strict=True))
        mixed = (b"".join(by_token[dice.choice(texts)] for _ in range(8)) for _ in range(_PROBES))
        return all(
            (ids := ours.spelt(text)) == whole.encode(text, add_special_tokens=False).ids
            and b"".join(pieces[token_id] for token_id in ids) == text.encode()
            for text in (_PROBE, *(unicodedata.normalize("NFC", bits.decode(errors="ignore")) for bits in mixed))
        )
    except KeyError:  # a letter that is none of its own
        return False
