"""What a model's answers look like: found from its chat template, for whose markers the families are known.

For a family not known here, it is what the tokenizer declares. Failing that, or where the template knows no tools, it
is `PLAIN`: the tools are described in words then (`pipelines.prompt`), and called as Hermes does. Whether a model says
where in a picture things are is in its vocabulary (`answer.boxes`). Knows no tokenizer and no messages.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipelines.answer import boxes, calls
from pipelines.answer.declared import Declared, DeclaredParser
from pipelines.answer.parser import AnswerParser, Parser, ReadCall
from pipelines.errors import StageError
from pipelines.template import ChatTemplate
from pipelines.tools import Tools

log = logging.getLogger(__name__)

# Markers around reasoning; where a template holds the second, the model writes them.
_THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought\n", "<channel|>"))


@dataclass(frozen=True)
class Writing:
    """How a family writes calls, for those that are forced: `call` holds {name} and {arguments}.

    `single`: it writes one call an answer.
    """

    call: str
    start: str = ""
    separator: str = ""
    end: str = ""
    single: bool = False


@dataclass(frozen=True)
class Family:
    """`signs`: a template with one of these texts is of the family. `marks`: what its calls are written with, which
    may be special tokens of the tokenizer.
    """

    signs: tuple[str, ...]
    opens: Mapping[str, ReadCall]
    writing: Writing
    marks: tuple[str, ...]


_HERMES_CALL = '<tool_call>\n{"name": "{name}", "arguments": {arguments}}\n</tool_call>'
PLAIN = Family(
    signs=("<tool_call>",),
    opens={"<tool_call>": calls.tagged("</tool_call>")},
    writing=Writing(_HERMES_CALL, separator="\n"),
    marks=("<tool_call>", "</tool_call>"),
)
_MISTRAL_NAMED = Family(
    signs=("[ARGS]",),
    opens={"[TOOL_CALLS]": calls.array_or_named},
    writing=Writing("[TOOL_CALLS]{name}[ARGS]{arguments}"),
    marks=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
)
_MISTRAL = Family(
    signs=("[TOOL_CALLS]",),
    opens={"[TOOL_CALLS]": calls.array_or_named},
    writing=Writing('{"name": "{name}", "arguments": {arguments}}', "[TOOL_CALLS][", ", ", "]"),
    marks=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
)
_FUNCTION_GEMMA = Family(
    signs=("<start_function_call>",),
    opens={"<start_function_call>call:": calls.dialect("<escape>", "<end_function_call>")},
    writing=Writing("<start_function_call>call:{name}{arguments}<end_function_call>"),
    marks=("<start_function_call>", "<end_function_call>", "<escape>"),
)
_GEMMA_4 = Family(
    signs=("<|tool_call>",),
    opens={"<|tool_call>call:": calls.dialect('<|"|>', "<tool_call|>")},
    writing=Writing("<|tool_call>call:{name}{arguments}<tool_call|>"),
    marks=("<|tool_call>", "<tool_call|>", '<|"|>'),
)
_LLAMA_3 = Family(
    signs=("<|python_tag|>", '"parameters": dictionary of argument name'),
    opens={"{": calls.objects, "<|python_tag|>": calls.objects},
    writing=Writing('{"name": "{name}", "parameters": {arguments}}', single=True),
    marks=("<|python_tag|>",),
)
_FAMILIES = (PLAIN, _MISTRAL_NAMED, _MISTRAL, _FUNCTION_GEMMA, _GEMMA_4, _LLAMA_3)


@dataclass(frozen=True)
class AnswerFormat:
    """`native`: the template itself shows the tools, and calls in messages. `opened`: the prompt ends in reasoning.

    `declared` is the tokenizer's word, with what the prompt holds of the answer; a grammar still goes by `family`.
    `grid`: how many patches a side of a picture has, for a model that says where in it things are; else 0.
    """

    family: Family = PLAIN
    native: bool = False
    think: tuple[str, str] | None = None
    opened: bool = False
    marks: frozenset[str] = field(default_factory=frozenset)
    declared: Declared | None = None
    prefill: str = ""
    grid: int = 0

    @classmethod
    def load(cls, home: Path, template: str = "") -> AnswerFormat:
        """Of a prepared folder, with another template than its own if one is given."""
        return cls.of(ChatTemplate.load(home, template)).grounded(home)

    @classmethod
    def of(cls, template: ChatTemplate | None) -> AnswerFormat:
        if template is None:
            return cls()
        think = next((marks for marks in _THINKING if marks[1] in template.source), None)
        for_tools = template.with_tools or template
        known = (family for family in _FAMILIES if any(sign in for_tools.source for sign in family.signs))
        family = next(known, None) if for_tools.takes_tools else None
        prompt = _prompt(template)
        declared = _declared(template) if family is None else None
        if declared:
            prefill, native = declared.prefill(prompt), for_tools.takes_tools
            return cls(PLAIN, native, think, _ends_in(prompt, think), declared.marks, declared, prefill)
        marks = {*(family.marks if family else ()), *(mark.strip() for mark in think or ())}
        return cls(family or PLAIN, family is not None, think, _ends_in(prompt, think), frozenset(marks))

    def grounded(self, home: Path) -> AnswerFormat:
        """The same, with what the folder's vocabulary says of boxes."""
        grid = boxes.grid_of(home)
        return replace(self, grid=grid, marks=self.marks | boxes.marks(grid)) if grid else self

    def parser(self, tools: Tools | None, *, shaped: bool = False) -> AnswerParser | None:
        """For one answer; None where its text is its content. `shaped`: a grammar holds it (`answer.grammar`)."""
        inner = self._parser(tools, shaped)
        return boxes.BoxParser(self.grid, inner) if self.grid else inner

    def _parser(self, tools: Tools | None, shaped: bool) -> AnswerParser | None:
        functions = tools.callable if tools else ()
        if self.declared and not (functions and shaped):
            schemas = {function.name: function.parameters for function in functions}
            return DeclaredParser(self.declared, schemas, self.prefill)
        # Hermes' markers are plain words to a tokenizer; the others' are special tokens, which no reader of text sees.
        silent = self.family.marks if self.native and not functions and self.family is not PLAIN else ()
        if not (functions or self.think or silent):
            return None
        return Parser(
            self.think,
            thinking=self.opened,
            opens=self.family.opens if functions else None,
            silent=silent,
            schemas={function.name: function.parameters for function in functions},
        )

    def opens_in(self, prompt: str) -> bool:
        """Whether the answer to this prompt begins inside reasoning."""
        return _ends_in(prompt, self.think)


def _declared(template: ChatTemplate) -> Declared | None:
    if template.response is None:
        return None
    try:
        return Declared.of(template.response)
    except ValueError as error:
        log.warning("what the tokenizer declares of answers is left aside: %s", error)
        return None


def _prompt(template: ChatTemplate) -> str:
    """Any."""
    try:
        return template.render([{"role": "user", "content": "a"}])
    except StageError:
        return ""


def _ends_in(prompt: str, think: tuple[str, str] | None) -> bool:
    return think is not None and prompt.rstrip().endswith(think[0].rstrip())
