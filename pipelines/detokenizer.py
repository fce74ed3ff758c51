"""Token ids to text, piece by piece, exactly as `tokenizers` decodes them all at once.

Every id maps to an entry of a table that is filled as ids appear, so an id costs one dictionary look-up.
What an id adds to the text depends on its neighbours in few ways; `tokenizers`' decoders have four shapes:

    LOSSY    ByteLevel (GPT-2, Llama 3, Qwen, SmolLM): bytes, decoded like `String::from_utf8_lossy`
    RUNS     Replace, ByteFallback, Fuse[, Strip] (Gemma, Llama 2, Mistral): text, and runs of bytes that
             become characters only if the whole run is valid UTF-8
    FIRST    Metaspace, WordPiece, none: a token is spelt differently when it is the first
    WHOLE    anything else: nothing is released before the end, which is slow to read but never wrong

Knows no stop strings and no windows: `pipelines.postprocess` does.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import Decoder

from pipelines.vocabulary import Vocabulary, letter_bytes

# What an id stands for: text; bytes that need their neighbours; or nothing (a special or unknown token).
Entry = str | bytes | None

REPLACEMENT = "\ufffd"


class Stream(Protocol):
    """One answer's text as its ids arrive.

    `context`: how many of the last ids are needed to decode what follows, and how many characters a stream that
    begins with them gives again; None if only the whole will do. `started`: an id has counted as the answer's
    first. `pending`: an id has been told whose text is not settled.
    """

    @property
    def started(self) -> bool: ...

    @property
    def context(self) -> tuple[int, int] | None: ...

    @property
    def pending(self) -> bool: ...

    def spell(self, token_id: int) -> bytes | None:
        """What this id would add to the text, as UTF-8, if it came now; None if it is no text (a special token)."""

    def push(self, token_id: int) -> str:
        """The text that this id settles: it cannot change whatever follows."""

    def flush(self) -> str:
        """The text of what is not settled, if nothing follows."""


class Table(dict[int, Entry]):
    """Entries by id, made on first use: to make 262,144 at once would take most of a second."""

    def __init__(self, make: Callable[[int], Entry]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, token_id: int) -> Entry:
        entry = self[token_id] = self._make(token_id)
        return entry


@dataclass(frozen=True)
class Detokenizer:
    """`table` holds each id's entry anywhere but at the answer's start; `uniform`: and there too."""

    table: Table
    uniform: bool
    stream: Callable[[bool], Stream]  # told whether the answer has started before the ids to be pushed


def load(vocabulary: Vocabulary, keep: Collection[str] = ()) -> Detokenizer:
    """What equals its tokenizer's `decode(ids, skip_special_tokens=True)`; of `keep` it skips nothing."""
    decoder = vocabulary.decoder
    steps = _steps(json.loads(decoder.__getstate__()) if decoder is not None else None)
    kinds = [step["type"] for step in steps]
    token = _visible(vocabulary, keep)
    if kinds == ["ByteLevel"]:
        return _lossy(token)
    if (runs := _runs(steps, token)) is not None:
        return runs
    if kinds in ([], ["Metaspace"], ["WordPiece"]):
        return _first(decoder, token)
    return _whole(vocabulary.tokenizer, token)


def _data(entry: Entry) -> bytes | None:
    return entry.encode() if isinstance(entry, str) else entry


def _steps(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    if state is None:
        return []
    if state["type"] == "Sequence":
        return [step for inner in state["decoders"] for step in _steps(inner)]
    return [state]


def _visible(vocabulary: Vocabulary, keep: Collection[str]) -> Callable[[int], str | None]:
    """The token of an id, or None if `decode` skips it: by its content, as the Rust implementation does."""
    special = vocabulary.special.difference(keep)

    def token(token_id: int) -> str | None:
        content = vocabulary.token(token_id)
        return None if content in special else content

    return token


def _lossy(token: Callable[[int], str | None]) -> Detokenizer:
    byte_of = letter_bytes()

    def make(token_id: int) -> Entry:
        content = token(token_id)
        if not content:
            return None
        try:
            data = bytes([byte_of[char] for char in content])
        except KeyError:  # an added token with a character that stands for no byte is text as it is
            return content
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data

    table = Table(make)
    return Detokenizer(table, True, lambda started: LossyStream(table))


class LossyStream:
    """UTF-8, U+FFFD for each maximal invalid part: both Rust's `from_utf8_lossy` and Python's `replace`."""

    started = False

    def __init__(self, table: Table) -> None:
        self._table = table
        self._tail = b""  # the beginning of a character
        self._ids = 0  # since the one that it begins in
        self._before = b""  # what that one holds before it

    @property
    def context(self) -> tuple[int, int] | None:
        # In some scripts most ids end inside a character, so a window that waits for one that does not would grow.
        # Read afresh, the bytes before the character's are other characters, but the character's are the same: its
        # first byte is never the continuation of anything.
        return (self._ids, len(self._before.decode("utf-8", "replace"))) if self._tail else (0, 0)

    @property
    def pending(self) -> bool:
        return bool(self._tail)

    def spell(self, token_id: int) -> bytes | None:
        return _data(self._table[token_id])

    def push(self, token_id: int) -> str:
        entry = self._table[token_id]
        self._ids += 1
        if entry is None:
            return ""
        if isinstance(entry, str):
            if not self._tail:
                return entry
            entry = entry.encode()
        data = self._tail + entry
        text, consumed = codecs.utf_8_decode(data, "replace", False)
        self._tail = data[consumed:]
        # Python waits for the last byte of half a surrogate pair, which is no character whatever that is.
        if self._tail[:1] == b"\xed" and self._tail[1:2] >= b"\xa0":
            text += self.flush()
        if len(self._tail) <= len(entry):
            self._ids, self._before = 1, entry[: len(entry) - len(self._tail)]
        return text

    def flush(self) -> str:
        text, self._tail = self._tail.decode("utf-8", "replace"), b""
        return text


_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>", re.ASCII)  # as Rust's u8::from_str_radix reads it


def _runs(steps: Sequence[dict[str, Any]], token: Callable[[int], str | None]) -> Detokenizer | None:
    """None if the steps are another shape."""
    kinds = [step["type"] for step in steps]
    replaces = kinds.index("ByteFallback") if "ByteFallback" in kinds else 0
    if kinds[replaces:] not in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        return None
    if any(step["type"] != "Replace" or not step["pattern"].get("String") for step in steps[:replaces]):
        return None
    strip: dict[str, Any] = steps[-1] if kinds[-1] == "Strip" else {"content": " ", "start": 0, "stop": 0}
    if strip["stop"]:  # the end of the text would change with every token
        return None
    pairs = [(step["pattern"]["String"], step["content"]) for step in steps[:replaces]]

    def make(token_id: int) -> Entry:
        content = token(token_id)
        if content is None:
            return None
        for pattern, replacement in pairs:
            content = content.replace(pattern, replacement)
        byte = _BYTE.fullmatch(content)
        return bytes([int(byte[1], 16)]) if byte else content

    table = Table(make)
    cut: int = strip["start"]
    fill: str = strip["content"]
    return Detokenizer(table, cut == 0, lambda started: RunStream(table, 0 if started else cut, fill))


class RunStream:
    """Text, and runs of bytes: U+FFFD all of them if the run is not valid UTF-8, so it settles at its end."""

    def __init__(self, table: Table, cut: int, fill: str) -> None:
        self._table = table
        self._run = b""
        self._ids = 0  # since the run's first
        self._cuts = cut  # how many of `fill` may still be cut from the start
        self._fill = fill
        self._fresh = True

    @property
    def started(self) -> bool:
        return not self._cuts

    @property
    def context(self) -> tuple[int, int] | None:
        if self._cuts and not self._fresh:
            return None
        return (self._ids, 0) if self._run else (0, 0)

    @property
    def pending(self) -> bool:
        return bool(self._run)

    def spell(self, token_id: int) -> bytes | None:
        entry = self._table[token_id]
        if isinstance(entry, bytes) and self._cuts:  # a space written as a byte is cut from the start all the same
            run, fill = self._run + entry, self._fill.encode()
            cut = run == fill * (len(run) // len(fill)) and len(run) <= self._cuts * len(fill)
            return b"" if cut else entry
        return _data(self._trim(entry)[0] if isinstance(entry, str) and not self._run else entry)

    def push(self, token_id: int) -> str:
        entry = self._table[token_id]
        self._ids = self._ids + 1 if self._run else 1
        if entry is None:
            return ""
        if isinstance(entry, bytes):
            self._run += entry
            return ""
        text = self._end_run() + entry if self._run else entry
        return self._cut(text) if self._cuts else text

    def flush(self) -> str:
        return self._cut(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _cut(self, text: str) -> str:
        """Strip the start of the answer: at most `cut` times, and only until something else comes."""
        self._fresh = self._fresh and not text
        text, self._cuts = self._trim(text)
        return text

    def _trim(self, text: str) -> tuple[str, int]:
        """The text without what is cut from it, and how many cuts are left then."""
        cuts = self._cuts
        while cuts and text:
            if not text.startswith(self._fill):
                return text, 0
            text = text[len(self._fill) :]
            cuts -= 1
        return text, cuts


def _first(decoder: Decoder | None, token: Callable[[int], str | None]) -> Detokenizer:
    """These decoders spell each token by itself, but for whether it is the first; so ask them both ways."""

    def spell(tokens: list[str]) -> str:
        # Without a decoder, `tokenizers` joins with spaces.
        return decoder.decode(tokens) if decoder is not None else " ".join(tokens)

    before = len(spell(["a"]))

    def make_first(token_id: int) -> Entry:
        content = token(token_id)
        return None if content is None else spell([content])

    def make_later(token_id: int) -> Entry:
        content = token(token_id)
        return None if content is None else spell(["a", content])[before:]

    first, later = Table(make_first), Table(make_later)
    return Detokenizer(later, False, lambda started: FirstStream(first, later, started))


class FirstStream:
    context = (0, 0)
    pending = False

    def __init__(self, first: Table, later: Table, started: bool) -> None:
        self._first = first
        self._later = later
        self.started = started

    def spell(self, token_id: int) -> bytes | None:
        return _data((self._later if self.started else self._first)[token_id])

    def push(self, token_id: int) -> str:
        entry = (self._later if self.started else self._first)[token_id]
        if entry is None:
            return ""
        self.started = True
        return str(entry)

    def flush(self) -> str:
        return ""


def _whole(tokenizer: Tokenizer, token: Callable[[int], str | None]) -> Detokenizer:
    return Detokenizer(Table(lambda token_id: None), False, lambda started: WholeStream(tokenizer, token))


class WholeStream:
    """The decoder is not known here, so any token may change any text: all of it waits for the end."""

    started = False

    def __init__(self, tokenizer: Tokenizer, token: Callable[[int], str | None]) -> None:
        self._tokenizer = tokenizer
        self._token = token
        self._ids: list[int] = []

    @property
    def context(self) -> tuple[int, int] | None:
        return None

    @property
    def pending(self) -> bool:
        return bool(self._ids)

    def spell(self, token_id: int) -> bytes | None:
        """By itself: what it becomes among others is not known."""
        return (
            None
            if self._token(token_id) is None
            else str(self._tokenizer.decode([token_id], skip_special_tokens=False)).encode()
        )

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return ""

    def flush(self) -> str:
        ids, self._ids = self._ids, []
        shown = [token_id for token_id in ids if self._token(token_id) is not None]
        return str(self._tokenizer.decode(shown, skip_special_tokens=False))
