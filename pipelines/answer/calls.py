"""How the families of models write calls: one coroutine each, which reads what follows the opening marker.

Written on `json_text`; what is read goes to a `Sink`. A coroutine returns the character that follows the call, or "" if
it has read exactly to its end, and raises Malformed where the text turns out to be none. Knows no content.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from typing import Any, Protocol

from pipelines.answer.json_text import (
    MAX_DEPTH,
    Emit,
    Malformed,
    Reading,
    is_scalar,
    literal,
    members,
    nothing,
    quoted,
    rest_of_members,
    space,
    value,
)
from pipelines.tools import NAME

_NAMES = ("name", "function")
_ARGUMENTS = ("arguments", "parameters")
_NO_KIND = {"description", "title", "default"}
_MAX_WORD = 256


class Sink(Protocol):
    """Takes the calls that are read. `schemas` are the arguments' JSON schemas of the functions offered, by name.

    What has been read when something is passed on, be it an empty text, is not given back as content.
    """

    schemas: Mapping[str, Mapping[str, Any]]

    def begin(self, name: str) -> None: ...

    def arguments(self, text: str) -> None: ...


def tagged(close: str) -> Any:
    """Hermes, Qwen: an object between tags. Inside them Qwen3-Coder and GLM write tags of their own instead."""

    def read(char: str, sink: Sink) -> Reading:
        char = yield from space(char)
        if char == "<":
            yield from literal(char, "<function=")
            char = yield from _coder_call((yield), sink)
        elif char.isalpha():
            return (yield from _glm_call(char, sink, close))
        else:
            char = yield from call_object(char, sink)
        while char == "}" or char.isspace():  # small models close one brace too many
            char = yield
        if not char:
            return ""
        yield from literal(char, close)
        return ""

    return read


def objects(char: str, sink: Sink) -> Reading:
    """Llama 3: bare objects, of which several are joined by semicolons."""
    while True:
        char = yield from call_object((yield from space(char)), sink, known=True)
        char = yield from space(char)
        if char != ";":
            return char
        char = yield


def array_or_named(char: str, sink: Sink) -> Reading:
    """Mistral: an array of objects, or, in its newer models, `name[ARGS]{…}`."""
    char = yield from space(char)
    if char == "{":
        return (yield from call_object(char, sink))
    if char != "[":
        return (yield from _named_call(char, sink))
    char = yield from space((yield))
    while True:
        char = yield from space((yield from call_object(char, sink)))
        if char == "]" or not char:
            return ""
        if char != ",":
            raise Malformed
        char = yield from space((yield))


def dialect(quote: str, close: str) -> Any:
    """FunctionGemma, Gemma 4: `name{key:value,…}` with quotes of their own and bare keys; or plain JSON."""

    def read(char: str, sink: Sink) -> Reading:
        name, char = yield from _until(char, "{")
        _begin(name, sink)
        sink.arguments("{")
        char = yield from space((yield))
        if char == '"':
            char = yield from rest_of_members(char, sink.arguments)
        else:
            char = yield from _loose_members(char, sink.arguments, quote)
        yield from literal((yield from space(char)), close)
        return ""

    return read


def call_object(char: str, sink: Sink, known: bool = False) -> Reading:
    """`{"name": …, "arguments": {…}}`, in any order. `known`: only a function that is offered, and no further key."""
    if char != "{":
        raise Malformed
    name = ""
    begun = given = False
    early: list[str] = []  # arguments that come before the name
    char = ","
    while char == ",":
        key, char = yield from _string((yield from space((yield))))
        char = yield from space(char)
        if char != ":":
            raise Malformed
        char = yield from space((yield))
        if key in _NAMES and not name and char == '"':
            name, char = yield from _string(char)
            if not NAME.fullmatch(name) or (known and name not in sink.schemas):
                raise Malformed
            if given or not known:
                sink.begin(name)
                sink.arguments("".join(early))
                begun = True
        elif key in _ARGUMENTS and not given:
            if name and not begun:
                sink.begin(name)
                begun = True
            char = yield from _arguments(char, sink.arguments if begun else early.append)
            given = True
        elif known and key not in ("type", "id"):
            raise Malformed
        else:
            char = yield from value(char, nothing)
        char = yield from space(char)
    if char != "}" or not name:
        raise Malformed
    if not begun:
        sink.begin(name)
    sink.arguments("" if given else "{}")
    return (yield)


def _arguments(char: str, emit: Emit) -> Reading:
    """An object; or, as some models write it, a string that holds one, or null."""
    if char == '"':
        text, char = yield from _string(char)
        emit(_object_text(text))
        return char
    if char == "n":
        yield from literal(char, "null")
        emit("{}")
        return (yield)
    return (yield from members(char, emit))


def _object_text(text: str) -> str:
    try:
        text.encode()  # an escape may spell half a character
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise Malformed from None
    if not isinstance(found, dict):
        raise Malformed
    return text or "{}"


def _named_call(char: str, sink: Sink) -> Reading:
    """`name[ARGS]{…}`, with `[CALL_ID]…` before the arguments or without."""
    name, char = yield from _until(char, "[{")
    if char == "[":
        tag, char = yield from _until((yield), "]")
        if tag == "CALL_ID":
            _, char = yield from _until((yield), "[")
            tag, char = yield from _until((yield), "]")
        if tag != "ARGS":
            raise Malformed
        char = yield from space((yield))
    if char != "{":
        raise Malformed
    _begin(name, sink)
    return (yield from members(char, sink.arguments))


def _coder_call(char: str, sink: Sink) -> Reading:
    """Qwen3-Coder, from behind `<function=`: a tag for each parameter, its value as text."""
    name, char = yield from _until(char, ">")
    _begin(name, sink)
    properties = sink.schemas.get(name, {}).get("properties")
    separator = "{"
    while True:
        yield from literal((yield from space((yield))), "<")
        char = yield
        if char == "/":
            yield from literal(char, "/function>")
            sink.arguments("{}" if separator == "{" else "}")
            return (yield)
        yield from literal(char, "parameter=")
        key, char = yield from _until((yield), ">")
        text = yield from _text_until("</parameter>")
        text = text.removeprefix("\n").removesuffix("\n")
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        sink.arguments(f"{separator}{_json(key)}: {typed(text, schema)}")
        separator = ", "


def _glm_call(char: str, sink: Sink, close: str) -> Reading:
    """GLM, from its name on: tags around each key, and each value."""
    name, char = yield from _until(char, "\n<")
    if name not in sink.schemas:  # else any word between tags is a call
        raise Malformed
    sink.begin(name)
    properties = sink.schemas.get(name, {}).get("properties")
    separator = "{"
    while True:
        yield from literal((yield from space(char)), "<")
        char = yield
        if char == "/":
            yield from literal(char, close[1:])
            sink.arguments("{}" if separator == "{" else "}")
            return ""
        yield from literal(char, "arg_key>")
        key = (yield from _text_until("</arg_key>")).strip()
        yield from literal((yield from space((yield))), "<arg_value>")
        text = yield from _text_until("</arg_value>")
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        sink.arguments(f"{separator}{_json(key)}: {typed(text, schema)}")
        separator = ", "
        char = yield


def typed(text: str, schema: object) -> str:
    """The JSON of a value that was written as text: a string where the schema allows one, or says nothing."""
    if not isinstance(schema, Mapping) or schema.keys() <= _NO_KIND:
        return _json(text)
    kinds = schema.get("type")
    if kinds == "string" or (isinstance(kinds, list) and "string" in kinds and text != "null"):
        return _json(text)
    try:
        return _json(json.loads(text))
    except (ValueError, RecursionError):
        return _json(text)


def _loose_members(char: str, emit: Emit, quote: str, depth: int = 0) -> Reading:
    """`key:value,…}`, from behind the brace; what is passed on is JSON."""
    while char != "}":
        key, char = yield from _until(char, ":")
        emit(_json(key) + ":")
        char = yield from space((yield from _loose_value((yield from space((yield))), emit, quote, depth + 1)))
        if char == ",":
            emit(char)
            char = yield from space((yield))
        elif char != "}":
            raise Malformed
    emit(char)
    return (yield)


def _loose_value(char: str, emit: Emit, quote: str, depth: int) -> Reading:
    if depth > MAX_DEPTH:
        raise Malformed
    if char == quote[0]:
        yield from literal(char, quote)
        emit(_json((yield from _text_until(quote))))
        return (yield)
    if char == '"':
        return (yield from quoted(char, emit))
    if char == "{":
        emit(char)
        return (yield from _loose_members((yield from space((yield))), emit, quote, depth))
    if char == "[":
        emit(char)
        char = yield from space((yield))
        while char != "]":
            char = yield from space((yield from _loose_value(char, emit, quote, depth + 1)))
            if char == ",":
                emit(char)
                char = yield from space((yield))
            elif char != "]":
                raise Malformed
        emit(char)
        return (yield)
    text = ""
    while char not in ",]}" or not char:
        if not char:
            raise Malformed
        text += char
        char = yield
    emit(text.strip() if is_scalar(text.strip()) else _json(text.strip()))
    return char


def _begin(name: str, sink: Sink) -> None:
    if not NAME.fullmatch(name):
        raise Malformed
    sink.begin(name)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _string(char: str) -> Generator[Any, str, tuple[str, str]]:
    """A JSON string's value, and the character that follows it."""
    pieces: list[str] = []
    char = yield from quoted(char, pieces.append)
    return json.loads("".join(pieces)), char


def _until(char: str, ends: str) -> Generator[Any, str, tuple[str, str]]:
    """A name: what comes before one of `ends`, and which."""
    word = ""
    while not char or char not in ends:
        if not char or len(word) > _MAX_WORD:
            raise Malformed
        word += char
        char = yield
    return word.strip(), char


def _text_until(end: str) -> Generator[Any, str, str]:
    text = ""
    while not text.endswith(end):
        char = yield
        if not char:
            raise Malformed
        text += char
    return text.removesuffix(end)
