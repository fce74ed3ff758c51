"""The grammar, in llguidance's Lark, of answers with calls that are held to the schemas of their arguments.

For calls that must be made, and for answers whose content has a shape of its own. It writes text, and asks llguidance
only whether it can follow a schema. A marker that is one token of the vocabulary is written as that token: llguidance
takes it for nothing else. Knows no messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipelines.answer.formats import AnswerFormat
from pipelines.errors import StageError
from pipelines.structure import Structure
from pipelines.tools import Tools

MAX_CALLS = 16  # in one answer: a small model that must call would go on to the end of its context
MAX_GRAMMAR = 128 * 1024  # characters: what a structure may hold

# What the models were trained on: JSON on one line, as `tojson` writes it.
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# With one of these beside its properties, a schema says more of its further properties than their names.
_SAYS_MORE = {
    "$ref",
    "additionalProperties",
    "allOf",
    "anyOf",
    "dependentSchemas",
    "if",
    "oneOf",
    "patternProperties",
    "unevaluatedProperties",
}

_ANY_OBJECT = '{"type": "object"}'

TokenId = Callable[[str], int | None]


def grammar(
    form: AnswerFormat, tools: Tools, token_id: TokenId, *, thinking: bool, otherwise: Structure | None = None
) -> str:
    """`token_id`: of a text that is one token. `thinking`: the prompt ends inside reasoning, which comes first then.

    `otherwise`: the shape of an answer without a call, for tools that may be called and need not be.
    """
    writing = form.family.writing
    write = _Literals((*form.family.marks, *form.marks), token_id)
    more = 0 if tools.single or writing.single else MAX_CALLS - 1
    rules = [
        f"start: {_reasoning(form, write, thinking)} {'calls' if otherwise is None else '(calls | answer)'}",
        f"calls: {write(writing.start)} call ({write(writing.separator)} call){{0,{more}}} {write(writing.end)}"
        if more
        else f"calls: {write(writing.start)} call {write(writing.end)}",
        "call: " + " | ".join(f"call_{index}" for index, _ in enumerate(tools.callable)),
    ]
    for index, function in enumerate(tools.callable):
        path = f"tools[{tools.functions.index(function)}].function.parameters"
        before, after = writing.call.replace("{name}", function.name).split("{arguments}")
        rules += [f"call_{index}: {write(before)} arguments_{index} {write(after)}"]
        rules += [f"arguments_{index}: %json {_arguments(function.parameters, path)}"]
    if form.think:
        lazy = "" if write.is_token(form.think[1]) else "[lazy]"
        rules += [r"THOUGHTS: /(.|\n)*/", r"SPACE: /[ \n]{0,2}/", f"thoughts{lazy}: THOUGHTS {write(form.think[1])}"]
    if otherwise:
        rules += [_answer(otherwise)]
    text = "\n".join(rules) + "\n"
    if len(text) > MAX_GRAMMAR:
        raise StageError(
            f"The functions of 'tools' are too large for a grammar: {len(text)} characters of at most {MAX_GRAMMAR}. "
            "Send fewer, or name one in 'tool_choice'.",
            param="tools",
        )
    return text


def _answer(structure: Structure) -> str:
    if structure.kind == "regex":
        pattern = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", structure.source, flags=re.DOTALL)
        return "answer: /" + pattern.replace("\n", r"\n") + "/"
    if structure.kind == "grammar":
        raise StageError(
            "A 'response_format' of type grammar cannot be combined with 'tools': write the calls into the grammar, "
            "or send 'tool_choice': 'none'.",
            param="response_format",
        )
    return f"answer: %json {_on_one_line(json.loads(structure.source or _ANY_OBJECT))}"


def _reasoning(form: AnswerFormat, write: _Literals, thinking: bool) -> str:
    if form.think is None:
        return ""
    return "thoughts SPACE" if thinking else f"({write(form.think[0])} thoughts SPACE)?"


def _arguments(parameters: Mapping[str, Any], path: str) -> str:
    """Named arguments only, unless the schema speaks of others: what it does not speak of would be noise."""
    from pipelines.trial import check  # llguidance: only where it is used

    schema: dict[str, Any] = {"type": "object", **parameters}
    if "properties" in schema and not _SAYS_MORE & schema.keys():
        schema["additionalProperties"] = False
    try:
        check(Structure("json_schema", json.dumps(schema)))
    except StageError as error:
        reason = error.message.removeprefix("'response_format'").partition(". Leave it out")[0]
        raise StageError(
            f"'{path}'{reason}. Write it differently, or let the model decide: 'tool_choice': 'auto'.", param=path
        ) from None
    return _on_one_line(schema)


def _on_one_line(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": _ONE_LINE})


class _Literals:
    """Text as Lark writes it, the marks in it that are tokens as tokens."""

    def __init__(self, marks: Iterable[str], token_id: TokenId) -> None:
        self._tokens = {mark: found for mark in marks if (found := token_id(mark)) is not None}
        self._parts = re.compile("(" + "|".join(map(re.escape, self._tokens)) + ")") if self._tokens else None

    def is_token(self, text: str) -> bool:
        return text in self._tokens

    def __call__(self, text: str) -> str:
        parts = self._parts.split(text) if self._parts else [text]
        return " ".join(self._part(part) for part in parts if part)

    def _part(self, part: str) -> str:
        return f"<[{self._tokens[part]}]>" if part in self._tokens else json.dumps(part, ensure_ascii=False)
