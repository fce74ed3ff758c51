"""What an answer's text turns into, piece by piece. Knows neither how models write nor how OpenAI shapes it."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable
from typing import NamedTuple

_LETTERS = string.ascii_letters + string.digits


class Content(NamedTuple):
    text: str


class Reasoning(NamedTuple):
    text: str


class Call(NamedTuple):
    """A call begins. `number` counts the answer's calls, from 0."""

    number: int
    id: str
    name: str


class Arguments(NamedTuple):
    """A further piece of a call's arguments; the pieces of one call add up to a JSON object."""

    number: int
    text: str


class Box(NamedTuple):
    """What the content from `start` to `end` names is in these pixels of a picture: x1, y1, x2, y2."""

    text: str
    start: int
    end: int
    pixels: tuple[int, int, int, int]
    picture: int


class Boxes(NamedTuple):
    """Those of one phrase. `number` counts the answer's boxes, from 0: that of the first of these."""

    number: int
    found: tuple[Box, ...]


Delta = Content | Reasoning | Call | Arguments | Boxes


def new_call_id() -> str:
    return "call_" + "".join(secrets.choice(_LETTERS) for _ in range(24))


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same with neighbours of one kind joined, and none that is empty."""
    found: list[Delta] = []
    for delta in deltas:
        last = found[-1] if found else None
        if isinstance(delta, Call | Boxes):
            found.append(delta)
        elif not delta.text:
            continue
        elif isinstance(last, type(delta)) and delta[:-1] == last[:-1]:
            found[-1] = delta._replace(text=last.text + delta.text)
        else:
            found.append(delta)
    return found
