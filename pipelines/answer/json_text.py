"""Follows JSON as it arrives: coroutines that are sent one character at a time.

Each is given the first character of what it reads, passes on what it has read to `emit`, and returns the character
that follows. The end of the text is sent as "". One that yields true stands inside a string, and may be sent a whole
run of `PLAIN` characters: arguments are mostly that. What is passed on is JSON a strict parser takes, though models
write line breaks inside strings. Knows nothing of calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from typing import Any

Emit = Callable[[str], object]
Reading = Generator[Any, str, str]  # sent characters; returns the one that follows

MAX_DEPTH = 64
PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SPACE = " \t\r\n"
_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null")
_ESCAPES = '"\\/bfnrt'
_HEX = "0123456789abcdefABCDEF"


class Malformed(Exception):
    """The text cannot become what it began as; the character sent last does not belong to it."""


def nothing(text: str) -> None:
    """For what is read and passed on to nobody."""


def space(char: str, emit: Emit = nothing) -> Reading:
    while char and char in _SPACE:
        emit(char)
        char = yield
    return char


def literal(char: str, text: str) -> Generator[Any, str, None]:
    """Exactly this text. It reads no further, so that a text's last marker is known for what it is at once."""
    for index, wanted in enumerate(text):
        if index:
            char = yield
        if char != wanted:
            raise Malformed
    return None


def value(char: str, emit: Emit, depth: int = 0) -> Reading:
    if char == '"':
        return (yield from quoted(char, emit))
    if char and char in "{[":
        if depth >= MAX_DEPTH:
            raise Malformed
        return (yield from (members if char == "{" else _items)(char, emit, depth))
    return (yield from _scalar(char, emit))


def quoted(char: str, emit: Emit) -> Reading:
    if char != '"':
        raise Malformed
    emit(char)
    while (char := (yield True)) != '"':
        if char == "\\":
            yield from _escape(emit)
        elif char:
            emit(char if char >= " " else json.dumps(char)[1:-1])
        else:
            raise Malformed
    emit(char)
    return (yield)


def _escape(emit: Emit) -> Generator[Any, str, None]:
    char = yield
    if char == "u":
        emit("\\u")
        for _ in range(4):
            digit = yield
            if not digit or digit not in _HEX:
                raise Malformed
            emit(digit)
    elif char and char in _ESCAPES:
        emit("\\" + char)
    elif char:  # `\d`, as models write regular expressions
        emit("\\\\" + (char if char >= " " else json.dumps(char)[1:-1]))
    else:
        raise Malformed


def members(char: str, emit: Emit, depth: int = 0) -> Reading:
    """An object."""
    if char != "{":
        raise Malformed
    emit(char)
    return (yield from rest_of_members((yield from space((yield), emit)), emit, depth))


def rest_of_members(char: str, emit: Emit, depth: int = 0) -> Reading:
    """An object, from behind its brace and the space after that."""
    while char != "}":
        char = yield from space((yield from quoted(char, emit)), emit)
        if char != ":":
            raise Malformed
        emit(char)
        char = yield from space((yield), emit)
        char = yield from space((yield from value(char, emit, depth + 1)), emit)
        if char == ",":
            emit(char)
            char = yield from space((yield), emit)
            if char == "}":
                raise Malformed
        elif char != "}":
            raise Malformed
    emit(char)
    return (yield)


def _items(char: str, emit: Emit, depth: int) -> Reading:
    emit(char)
    char = yield from space((yield), emit)
    while char != "]":
        char = yield from space((yield from value(char, emit, depth + 1)), emit)
        if char == ",":
            emit(char)
            char = yield from space((yield), emit)
            if char == "]":
                raise Malformed
        elif char != "]":
            raise Malformed
    emit(char)
    return (yield)


def _scalar(char: str, emit: Emit) -> Reading:
    text = ""
    while char and char not in _SPACE and char not in ",]}":
        text += char
        char = yield
    if not is_scalar(text):
        raise Malformed
    emit(text)
    return char


def is_scalar(text: str) -> bool:
    """Whether it is a JSON number, true, false or null."""
    return _SCALAR.fullmatch(text) is not None
