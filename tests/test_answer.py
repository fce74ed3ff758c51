"""Answers as models write them, into content, reasoning and calls; and the grammar that makes a model write them."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.answer import formats
from pipelines.answer.deltas import Arguments, Call, Content, Delta, Reasoning, merged, new_call_id
from pipelines.answer.formats import AnswerFormat
from pipelines.tools import Tools, parse_tools

THINK = ("<think>", "</think>")
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
FAMILIES = {
    "plain": formats.PLAIN,
    "mistral": formats._MISTRAL,
    "mistral-named": formats._MISTRAL_NAMED,
    "function-gemma": formats._FUNCTION_GEMMA,
    "gemma-4": formats._GEMMA_4,
    "llama": formats._LLAMA_3,
}


def offered(**more: object) -> Tools:
    functions = [
        {"type": "function", "function": {"name": "weather", "parameters": CITY}},
        {"type": "function", "function": {"name": "now"}},
    ]
    tools = parse_tools({"tools": functions, **more})
    assert tools is not None
    return tools


def form(family: str, think: tuple[str, str] | None = None, opened: bool = False) -> AnswerFormat:
    return AnswerFormat(FAMILIES[family], True, think, opened, frozenset(think or ()))


def parsed(form: AnswerFormat, *pieces: str, tools: Tools | None = None) -> list[Delta]:
    """What the pieces come to, without the calls' ids."""
    parser = form.parser(tools)
    if parser is None:
        return merged([Content("".join(pieces))])
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    return [delta._replace(id="") if isinstance(delta, Call) else delta for delta in merged(deltas)]


def call(number: int, name: str, arguments: str) -> list[Delta]:
    return [Call(number, "", name), Arguments(number, arguments)]


ROME = '{"city": "Rome"}'
# family, what the model writes, what it comes to
WRITTEN = [
    ("plain", "Just words.", [Content("Just words.")]),
    ("plain", f'<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>', call(0, "weather", ROME)),
    (
        "plain",
        f'Let me see.\n\n<tool_call>{{"name": "weather", "arguments": {ROME}}}</tool_call>\n'
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>\n',
        [Content("Let me see."), *call(0, "weather", ROME), *call(1, "now", "{}")],
    ),
    ("plain", '<tool_call>{"name": "now"}</tool_call> Done. ', [*call(0, "now", "{}"), Content("Done. ")]),
    ("plain", f'<tool_call>{{"arguments": {ROME}, "name": "weather"}}</tool_call>', call(0, "weather", ROME)),
    ("plain", f'<tool_call>{{"name": "weather", "parameters": {ROME}}}</tool_call>', call(0, "weather", ROME)),
    ("plain", '<tool_call>{"name": "now", "arguments": null}</tool_call>', call(0, "now", "{}")),
    ("plain", '<tool_call>{"name": "now", "arguments": ""}</tool_call>', call(0, "now", "{}")),
    (
        "plain",
        '<tool_call>{"name":"weather","arguments":"{\\"city\\": \\"Rome\\"}"}</tool_call>',
        call(0, "weather", ROME),
    ),
    ("plain", '<tool_call>{"name": "now", "arguments": {}}}\n</tool_call>', call(0, "now", "{}")),
    ("plain", '<tool_call>{"name": "elsewhere", "id": [1, {"a": null}]}</tool_call>', call(0, "elsewhere", "{}")),
    # A line break inside a string, and a backslash of a regular expression, are mended.
    ("plain", '<tool_call>{"name":"f","arguments":{"a":"1\n2\\d"}}</tool_call>', call(0, "f", '{"a":"1\\n2\\\\d"}')),
    (
        "plain",
        '<tool_call>{"name": "f", "arguments": {"a": -1.5e3, "b": [true, "\\u00e9"]}}</tool_call>',
        call(0, "f", '{"a": -1.5e3, "b": [true, "\\u00e9"]}'),
    ),
    # The end is missing, or comes too soon.
    ("plain", f'<tool_call>{{"name": "weather", "arguments": {ROME}}}', call(0, "weather", ROME)),
    ("plain", f'<tool_call>{{"name": "weather", "arguments": {ROME}}}\n</tool', call(0, "weather", ROME)),
    ("plain", '<tool_call>{"name": "weather", "arguments": {"city": "Ro', call(0, "weather", '{"city": "Ro')),
    ("plain", '<tool_call>{"name": "wea', [Content('<tool_call>{"name": "wea')]),
    ("plain", '<tool_call>{"name": "now"}</tool_call><tool_call>{"na', call(0, "now", "{}")),
    ("plain", "Less is < more <tool", [Content("Less is < more <tool")]),
    (
        "plain",
        '<tool_call>{"name": "now", "arguments": {}}\n<tool_call>{"name": "weather", "arguments": '
        + ROME
        + "}</tool_call>",
        [*call(0, "now", "{}"), *call(1, "weather", ROME)],
    ),
    # None of these is a call.
    ("plain", "Write <tool_call>x</tool_call>.", [Content("Write <tool_call>x</tool_call>.")]),
    ("plain", '<tool_call>{"arguments": {}}</tool_call>', [Content('<tool_call>{"arguments": {}}</tool_call>')]),
    ("plain", '<tool_call>{"name": "a b"}</tool_call>', [Content('<tool_call>{"name": "a b"}</tool_call>')]),
    ("plain", '<tool_call>{"name": 1}</tool_call>', [Content('<tool_call>{"name": 1}</tool_call>')]),
    (
        "plain",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        [Call(0, "", "f"), Content(' "arguments": [1]}</tool_call>')],
    ),
    (
        "plain",
        '<tool_call>{"name": "f", "arguments": {"a": 1, b}}</tool_call>',
        [*call(0, "f", '{"a": 1, '), Content("b}}</tool_call>")],
    ),
    # Qwen3-Coder, whose values are text: the schema says of which kind.
    (
        "plain",
        "<tool_call>\n<function=weather>\n<parameter=city>\nRome\nItaly\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        call(0, "weather", '{"city": "Rome\\nItaly", "days": 3}'),
    ),
    ("plain", "<tool_call>\n<function=now>\n</function>\n</tool_call>", call(0, "now", "{}")),
    (
        "plain",
        "<tool_call><function=weather><parameter=days>soon</parameter></function></tool_call>",
        call(0, "weather", '{"days": "soon"}'),
    ),
    # GLM
    (
        "plain",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>",
        call(0, "weather", '{"city": "Rome", "days": 3}'),
    ),
    ("mistral", f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ROME}}}]', call(0, "weather", ROME)),
    (
        "mistral",
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {ROME}}}, {{"name": "now", "arguments": {{}}}}]',
        [*call(0, "weather", ROME), *call(1, "now", "{}")],
    ),
    ("mistral", "[TOOL_CALLS] are [1]", [Content("[TOOL_CALLS] are [1]")]),
    (
        "mistral-named",
        f"Hm.[TOOL_CALLS]weather[ARGS]{ROME}[TOOL_CALLS]now[CALL_ID]a1[ARGS]{{}}",
        [Content("Hm."), *call(0, "weather", ROME), *call(1, "now", "{}")],
    ),
    ("mistral-named", f"[TOOL_CALLS]weather{ROME}", call(0, "weather", ROME)),
    (
        "function-gemma",
        '<start_function_call>call:weather{city:<escape>Rome, "Italy"<escape>,days:3,more:[<escape>a<escape>,{b:true}]}'
        "<end_function_call>",
        call(0, "weather", '{"city":"Rome, \\"Italy\\"","days":3,"more":["a",{"b":true}]}'),
    ),
    ("function-gemma", "<start_function_call>call:now{}<end_function_call>", call(0, "now", "{}")),
    (
        "gemma-4",
        '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>',
        call(0, "weather", '{"city":"Rome","days":3}'),
    ),
    ("llama", f'{{"name": "weather", "parameters": {ROME}}}', call(0, "weather", ROME)),
    (
        "llama",
        f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {ROME}}}',
        call(0, "weather", ROME),
    ),
    (
        "llama",
        f' {{"name": "weather", "parameters": {ROME}}}; {{"name": "now", "parameters": {{}}}}',
        [*call(0, "weather", ROME), *call(1, "now", "{}")],
    ),
    # JSON that is an answer.
    ("llama", '{"name": "Ada", "age": 36}', [Content('{"name": "Ada", "age": 36}')]),
    ("llama", '{"name": "now", "age": 36}', [Content('{"name": "now", "age": 36}')]),
    ("llama", 'See {"name": "now", "parameters": {}}', [Content('See {"name": "now", "parameters": {}}')]),
    ("llama", "<|python_tag|>print(1)", [Content("<|python_tag|>print(1)")]),
]


@pytest.mark.parametrize(("family", "text", "wanted"), WRITTEN)
def test_what_is_written_in_one_piece_and_in_single_characters(family, text, wanted):
    assert parsed(form(family), text, tools=offered()) == wanted
    assert parsed(form(family), *text, tools=offered()) == wanted


@pytest.mark.parametrize(
    ("opened", "text", "wanted"),
    [
        (False, "<think>\nHm.\n</think>\n\nYes.", [Reasoning("Hm."), Content("Yes.")]),
        (False, "\n<think></think>Yes.", [Content("Yes.")]),
        (False, "Yes. <think>Hm.</think>", [Content("Yes. <think>Hm.</think>")]),
        (False, "<think>\nHm. <tool_call>", [Reasoning("Hm. <tool_call>")]),
        (False, "<thin", [Content("<thin")]),
        (True, "\nHm.\n</think>\n\nYes.", [Reasoning("Hm."), Content("Yes.")]),
        (True, "<think>\nHm.</think> Yes.", [Reasoning("Hm."), Content("Yes.")]),
        (True, "Hm. 1 < 2 </thi", [Reasoning("Hm. 1 < 2 </thi")]),
        (True, "</think>Yes.</think>", [Content("Yes.</think>")]),
        (
            True,
            f'Hm.</think>\n<tool_call>{{"name": "weather", "arguments": {ROME}}}</tool_call>',
            [Reasoning("Hm."), *call(0, "weather", ROME)],
        ),
    ],
)
def test_reasoning(opened, text, wanted):
    for pieces in ([text], text):
        assert parsed(form("plain", THINK, opened), *pieces, tools=offered()) == wanted


PIECES = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<think>",
            "</think>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "<|python_tag|>",
            "<function=f>",
        ),
        *(
            '{"name": "now", "arguments": ',
            '{"city": "Rome"}',
            "}",
            "{",
            '"',
            ":",
            ",",
            "[",
            "]",
            ";",
            "<",
            "\\",
            "\n",
            " ",
        ),
        *(
            "<start_function_call>call:now",
            "<escape>",
            "<end_function_call>",
            "<parameter=a>",
            "</parameter>",
            "</function>",
        ),
        *("now", "\\u00", "1", "true", "x", "日", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    family=st.sampled_from(list(FAMILIES)),
    opened=st.sampled_from([None, False, True]),
    pieces=st.lists(PIECES, max_size=14),
    with_tools=st.booleans(),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_however_the_text_is_cut_the_result_is_the_same(family, opened, pieces, with_tools, cuts):
    text = "".join(pieces)
    asked = form(family, THINK if opened is not None else None, bool(opened))
    tools = offered() if with_tools else None
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    whole = parsed(asked, text, tools=tools)
    assert parsed(asked, *(text[a:b] for a, b in pairwise(ends)), tools=tools) == whole
    assert parsed(asked, *text, tools=tools) == whole


@settings(max_examples=200, deadline=None)
@given(family=st.sampled_from(list(FAMILIES)), text=st.text(alphabet='ab <[{"|\n>日t_', max_size=30))
def test_text_without_markers_is_content_to_the_last_character(family, text):
    assert parsed(form(family, THINK), *text, tools=offered()) == merged([Content(text)])


@settings(max_examples=200, deadline=None)
@given(
    arguments=st.dictionaries(
        st.text(max_size=4),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    ),
    indent=st.sampled_from([None, 2]),
    ascii=st.booleans(),
)
def test_any_arguments_arrive_as_they_were_written(arguments, indent, ascii):
    written = json.dumps(arguments, indent=indent, ensure_ascii=ascii)
    text = f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>'
    assert parsed(form("plain"), *text, tools=offered()) == merged(call(0, "f", written))


def test_text_is_held_no_longer_than_it_must_be():
    parser = form("plain").parser(offered())
    assert parser is not None
    assert parser.push("So: <b> ") == [Content("So: <b>")]
    assert parser.push('<tool_call>{"name": "wea') == []
    begun = parser.push('ther", "argu')
    assert [(delta.number, delta.name) for delta in begun if isinstance(delta, Call)] == [(0, "weather")]
    assert parser.push('ments": {"ci') == [Arguments(0, '{"ci')]
    assert parser.push('ty": "Ro') == [Arguments(0, 'ty": "Ro')]
    assert parser.push('me"}}') == [Arguments(0, 'me"}')]
    assert parser.push("</tool_call>\nBye") == [Content("Bye")]
    assert parser.finish() == []


def test_without_functions_a_call_is_text_but_for_markers_that_readers_never_see():
    written = f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ROME}}}]'
    assert parsed(form("mistral"), *written) == [Content(written.removeprefix("[TOOL_CALLS]"))]
    assert parsed(form("mistral"), *written, tools=offered(tool_choice="none")) == parsed(form("mistral"), written)


def test_without_functions_hermes_markers_are_words():
    text = "Write <tool_call> before it."
    assert form("plain").parser(None) is None
    assert parsed(form("plain", THINK), *text) == [Content(text)]


def test_an_answer_that_can_only_be_text_needs_no_parser():
    assert AnswerFormat().parser(None) is None
    assert AnswerFormat().parser(offered(tool_choice="none")) is None
    assert AnswerFormat().parser(offered()) is not None


def test_ids_are_openais_and_never_the_same():
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"call_[a-zA-Z0-9]{24}", id) for id in ids)
