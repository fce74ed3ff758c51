"""Formats that a tokenizer declares, read as transformers reads them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.answer import formats
from pipelines.answer.deltas import Arguments, Call, Content, Reasoning
from pipelines.answer.formats import AnswerFormat
from pipelines.template import ChatTemplate
from tests.test_answer import ROME, offered, parsed

TAGS = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<a>",
    "fields": {
        "reasoning_content": {"open": "<thinking>", "close": "</thinking>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<do>",
            "close": "</do>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<end>", "content": "text"},
    },
}
INLINE = {
    "start_anchor": "<a>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<do>\s*<f=(?P<name>[^>\n]+)>",
            "close_pattern": r"</f>\s*</do>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<p=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</p>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}
DIALECT = {
    "start_anchor": ["<a>", "<b>"],
    "fields": {
        "thinking": {"open": "<|channel>thought\n", "close": "<channel|>"},
        "tool_calls": {
            "open_pattern": r"<\|do>call:(?P<name>\w+)",
            "close": "<do|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [["<|q|>", "<|q|>"]]},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": ["<turn|>"], "content": "text"},
    },
}
LIST = {
    "start_anchor": "<a>",
    "fields": {
        "tool_calls": {
            "open": "[CALLS]",
            "content": "json",
            "transform": {"function": {"name": "{name}", "arguments": "{args}"}},
            "transform_each": True,
        },
        "content": {},
    },
}
LINES = {
    "start_anchor": "<a>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<do (?P<name>\w+)>\n",
            "close": "</do>",
            "repeats": True,
            "content": "kv-lines",
            "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}
DECLARED = [
    (TAGS, "<a>", "Just words.\n"),
    (TAGS, "<a>", '<thinking>\nHm.\n</thinking>\n\nYes. <do>{"name": "weather", "arguments": {"city": "Rome"}}</do>'),
    (TAGS, "<a>", '<do>{"name": "now", "arguments": {}}</do>\n<do>{"name": "now", "arguments": {"a": [1]}}</do><end>'),
    (TAGS, "x<a>", "Yes.\n<end>"),
    (TAGS, "<a>one<a><thinking>\n", "Hm.</thinking>Yes."),
    (INLINE, "<a>", "So: <do>\n<f=weather>\n<p=city>\nRome\n</p>\n<p=days>\n3\n</p>\n</f>\n</do>"),
    (INLINE, "<a>", "<do><f=now></f></do>"),
    (DIALECT, "<b>", '<|channel>thought\nHm.<channel|>So.<|do>call:weather{city:<|q|>Rome, {a: "b"}<|q|>,days:3}<do|>'),
    (DIALECT, "<a>", "<|do>call:now{}<do|><turn|>"),
    (LIST, "<a>", '[CALLS] [{"name": "weather", "args": {"city": "Rome"}}, {"name": "now", "args": {}}]'),
    (LINES, "<a>", "<do weather>\ncity: Rome\ndays: 3\n</do>"),
]


def declared(spec: dict, prompt: str = "<a>") -> AnswerFormat:
    found = AnswerFormat.of(ChatTemplate("{{ tools if tools }}{% raw %}" + prompt + "{% endraw %}", response=spec))
    assert found.declared
    return found


@pytest.mark.parametrize(("spec", "prompt", "text"), DECLARED)
def test_a_declared_format_is_read_as_transformers_reads_it(spec, prompt, text):
    from transformers.utils.chat_parsing import parse_response

    tools = offered()
    functions = [{"type": "function", "function": dict(function.given)} for function in tools.functions]
    wanted = parse_response(text, spec, prefix=prompt, tools=functions)
    for pieces in ([text], text):
        found = parsed(declared(spec, prompt), *pieces, tools=tools)
        content = "".join(delta.text for delta in found if isinstance(delta, Content))
        reasoning = "".join(delta.text for delta in found if isinstance(delta, Reasoning))
        arguments = [json.loads(delta.text) for delta in found if isinstance(delta, Arguments)]
        names = [delta.name for delta in found if isinstance(delta, Call)]
        assert content == wanted.get("content", "")
        assert reasoning == wanted.get("reasoning_content", wanted.get("thinking", ""))
        calls = wanted.get("tool_calls", [])
        calls = [call for one in calls for call in (one if isinstance(one, list) else [one])]
        assert list(zip(names, arguments, strict=True)) == [
            (call["function"]["name"], call["function"]["arguments"]) for call in calls
        ]


DECLARED_PIECES = st.sampled_from(
    [
        *(
            "<thinking>",
            "</thinking>",
            "<do>",
            "</do>",
            "<end>",
            " ",
            "\n",
            "x",
            '{"name": "now", "arguments": {}}',
            "{",
            "<",
        ),
        *(
            "<f=now>",
            "<p=a>",
            "</p>",
            "</f>",
            "<|do>call:now",
            "{a:1}",
            "<do|>",
            "[CALLS]",
            "<|channel>thought\n",
            "<channel|>",
        ),
    ]
)


@settings(max_examples=200, deadline=None)
@given(spec=st.sampled_from([TAGS, INLINE, DIALECT, LIST]), pieces=st.lists(DECLARED_PIECES, max_size=12))
def test_a_declared_format_does_not_depend_on_the_cuts_either(spec, pieces):
    text = "".join(pieces)
    form = declared(spec)
    whole = parsed(form, text, tools=offered())
    assert parsed(form, *text, tools=offered()) == whole
    assert parsed(form, *pieces, tools=offered()) == whole


def test_a_declared_call_that_is_none_is_content():
    for body in ("nothing</do>", "nothing", '{"name": "a b"}</do>', '{"name": "f", "arguments": 3}</do>', "[1]</do>"):
        assert parsed(declared(TAGS), f"So <do>{body}", tools=offered()) == [Content(f"So <do>{body}")]


def test_a_declared_format_streams_and_names_its_markers():
    form = declared(TAGS)
    assert {"<do>", "</do>", "<thinking>", "</thinking>"} <= form.marks
    assert "<end>" not in form.marks, "the end of an answer is nobody's text"
    parser = form.parser(offered())
    assert parser is not None
    assert parser.push("Hello wor") == [Content("Hello wor")]
    assert parser.push("ld <d") == [Content("ld")]


def test_a_family_that_is_known_goes_before_what_is_declared():
    found = AnswerFormat.of(ChatTemplate("{{ tools }}<tool_call>", response=TAGS))
    assert (found.family, found.declared) == (formats.PLAIN, None)


def test_calls_that_a_grammar_writes_are_read_so_whatever_is_declared():
    text = f'<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>'
    parser = declared(TAGS).parser(offered(), shaped=True)
    assert parser is not None
    found = [*parser.push(text), *parser.finish()]
    assert [delta.name for delta in found if isinstance(delta, Call)] == ["weather"]


@pytest.mark.parametrize(
    "spec",
    [
        {"version": 2, "fields": {}},
        {"fields": {"a": {}, "b": {}}},
        {"fields": {"a": {"open_pattern": "("}}},
        {"fields": []},
        {},
    ],
)
def test_a_declaration_that_cannot_be_followed_is_left_aside(spec):
    assert AnswerFormat.of(ChatTemplate("{{ messages }}", response=spec)) == AnswerFormat()
