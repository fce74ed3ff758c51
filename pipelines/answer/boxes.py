"""Where in a picture the things are that an answer names: Kosmos-2's tags, read as they arrive.

`<phrase> a cat</phrase><object><patch_index_0044><patch_index_0863></object>` becomes the content "a cat [x1, y1, x2,
y2]" and a `Box`. A patch is a cell of a square grid over the picture; what two of them span is what transformers'
Kosmos2Processor says, in pixels of the picture as a person sees it, halves rounded up. Tags are left out wherever they
stand, those of an object that is malformed or cut short too: it has no box, and its words stay. Only the model's own
tags are such; any other text between angle brackets is text. However the text is cut, the result is the same.

Knows neither pictures nor how OpenAI shapes it. What calls and reasoning hold is not read.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path

from pipelines import vocabulary
from pipelines.answer.deltas import Box, Boxes, Content, Delta, merged
from pipelines.answer.parser import AnswerParser

log = logging.getLogger(__name__)

Size = tuple[int, int]  # width and height

_NEXT = "</delimiter_of_multi_objects/>"
_OBJECT = ("<object>", "</object>", _NEXT)
_TAGS = ("<phrase>", "</phrase>", *_OBJECT)
_SILENT = ("<grounding>", "<image>", "</image>", "</doc>", "</chunk>", "</line>")
_PATCH = "<patch_index_"
_PATCHES = re.compile(r"<patch_index_(\d{1,6})>", re.ASCII)
_TAG = re.compile("|".join(map(re.escape, (*_TAGS, *_SILENT))) + "|" + _PATCHES.pattern, re.ASCII)
_BEGUN = re.compile(_PATCH + r"\d{0,6}", re.ASCII)


def grid_of(home: Path) -> int:
    """How many patches a side has, for a tokenizer that has patches and phrases; else 0."""
    text = vocabulary.text_of(home)
    if '"<patch_index_0000>"' not in text or '"<phrase>"' not in text:
        return 0
    patches = {int(number) for number in re.findall(r'"<patch_index_(\d{1,6})>"', text)}
    side = math.isqrt(len(patches))
    if patches != set(range(side * side)):
        log.warning("the patches of %s are no square: its boxes are left as text", home / vocabulary.TOKENIZER)
        return 0
    return side


def marks(grid: int) -> frozenset[str]:
    """What must reach the reader as text, even where the tokenizer calls it special."""
    return frozenset((*_TAGS, *(f"{_PATCH}{number:04}>" for number in range(grid * grid))))


def box(first: int, last: int, grid: int, size: Size) -> tuple[int, int, int, int]:
    """What two patches span, in pixels.

    Within one row or column it is their cells; else it goes from the middle of the one to that of the other.
    """
    (top, left), (bottom, right) = divmod(first, grid), divmod(last, grid)
    before, after = (0, 2) if top == bottom or left == right else (1, 1)  # half cells

    def pixels(cell: int, halves: int, length: int) -> int:
        # Whole numbers, so that a half is one: n / d, halves up, is (2 n + d) // 2 d, with d = 2 grid.
        return ((2 * cell + halves) * length + grid) // (2 * grid)

    width, height = size
    return (
        pixels(left, before, width),
        pixels(top, before, height),
        pixels(right, after, width),
        pixels(bottom, after, height),
    )


class BoxParser:
    """Reads the content of another parser, or all of the text. `pictures`: their sizes, told before any text.

    Boxes are of the first picture; without one there are none. Their positions count the characters of the content,
    the boxes' own text included.
    """

    def __init__(self, grid: int, inner: AnswerParser | None = None) -> None:
        self.pictures: Sequence[Size] = ()
        self._grid = grid
        self._inner = inner
        self._pending = ""
        self._out: list[Delta] = []
        self._boxes = 0
        self._length = 0  # of the content that is out
        self._space = ""  # behind it, and out once something follows: what ends a content is left out
        self._phrase: list[str] | None = None  # inside one: its pieces
        self._start = 0  # of its first character that is no space
        self._named: tuple[str, int, int] | None = None  # the phrase that ended just here
        self._of: tuple[str, int, int] = ("", 0, 0)  # the phrase of the object
        self._patches: list[list[int]] | None = None  # inside an object that is well-formed so far: the pairs

    def push(self, text: str) -> list[Delta]:
        for delta in self._inner.push(text) if self._inner else [Content(text)]:
            self._take(delta)
        return self._taken()

    def finish(self) -> list[Delta]:
        for delta in self._inner.finish() if self._inner else ():
            self._take(delta)
        self._text(self._pending)
        self._pending = ""
        return self._taken()

    def _taken(self) -> list[Delta]:
        out, self._out = self._out, []
        return merged(out)

    def _take(self, delta: Delta) -> None:
        if not isinstance(delta, Content):
            self._out.append(delta)
            return
        text, at = self._pending + delta.text, 0
        for tag in _TAG.finditer(text):
            self._text(text[at : tag.start()])
            self._tag(tag[0], tag[1])
            at = tag.end()
        keep = _begun(text, at)
        self._text(text[at:keep])
        self._pending = text[keep:]

    def _text(self, text: str) -> None:
        if not text:
            return
        self._named = self._patches = None
        behind = (self._space + text) if self._length else text.lstrip()
        body = behind.rstrip()
        self._space = behind[len(body) :]
        if self._phrase is not None:
            if body and not "".join(self._phrase).strip():
                self._start = self._length + len(body) - len(body.lstrip())
            self._phrase.append(text)
        self._say(body)

    def _say(self, text: str) -> None:
        self._out.append(Content(text))
        self._length += len(text)

    def _tag(self, tag: str, patch: str | None) -> None:
        named, self._named = self._named, None
        phrase, self._phrase = self._phrase, None
        if patch is not None:
            self._patch(int(patch))
        elif tag == _NEXT:
            self._next()
        elif tag == "</object>":
            self._end_object()
        elif tag == "<object>":
            self._of = named or ("", self._length, self._length)
            self._patches = [[]]
        else:
            self._patches = None
            if tag == "</phrase>" and phrase:
                text = "".join(phrase).strip()
                self._named = (text, self._start if text else self._length, self._length)
            self._phrase = [] if tag == "<phrase>" else None

    def _patch(self, number: int) -> None:
        if self._patches is not None and len(self._patches[-1]) < 2 and number < self._grid**2:
            self._patches[-1].append(number)
        else:
            self._patches = None

    def _next(self) -> None:
        if self._patches is not None and len(self._patches[-1]) == 2:
            self._patches.append([])
        else:
            self._patches = None

    def _end_object(self) -> None:
        patches, self._patches = self._patches, None
        if patches is None or len(patches[-1]) < 2 or not self.pictures:
            return
        boxes = [box(first, last, self._grid, self.pictures[0]) for first, last in patches]
        told = " ".join(str(list(each)) for each in boxes)
        self._say(f" {told}" if self._length else told)
        self._out.append(Boxes(self._boxes, tuple(Box(*self._of, each, 0) for each in boxes)))
        self._boxes += len(boxes)


def _begun(text: str, at: int) -> int:
    """Where from `at` on a tag may have begun that is not whole yet; else the text's end."""
    start = text.find("<", max(at, text.rfind("<")))
    if start < 0:
        return len(text)
    rest = text[start:]
    may_be = any(tag.startswith(rest) for tag in (*_TAGS, *_SILENT, _PATCH)) or _BEGUN.fullmatch(rest)
    return start if may_be else len(text)
