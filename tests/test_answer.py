"""Answers as models write them, into content, reasoning and calls; and the grammar that makes a model write them."""

import json
import random
import re
from itertools import pairwise
from pathlib import Path

import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipelines.answer import formats
from pipelines.answer.deltas import Arguments, Call, Content, Delta, Reasoning, merged, new_call_id
from pipelines.answer.formats import AnswerFormat
from pipelines.answer.grammar import grammar
from pipelines.errors import StageError
from pipelines.structure import Structure
from pipelines.template import ChatTemplate
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


# --- which format a model has


@pytest.mark.parametrize(
    ("template", "family", "think"),
    [
        ("{% for tool in tools %}{% endfor %}<tool_call>", "plain", None),
        ("{% if tools %}{% endif %}<tool_call> {{ '</think>' }}", "plain", THINK),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", "mistral", None),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]f[ARGS]", "mistral-named", None),
        ("{% if tools %}{% endif %}<start_function_call>", "function-gemma", None),
        ("{% if tools %}{% endif %}<|tool_call>call:", "gemma-4", None),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}<|python_tag|>", "llama", None),
    ],
)
def test_a_format_is_found_by_its_markers(template, family, think):
    found = AnswerFormat.of(ChatTemplate(template))
    assert (found.family, found.native, found.think, found.opened) == (FAMILIES[family], True, think, False)
    assert found.marks == {*FAMILIES[family].marks, *(think or ())}


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content }}", "{{ messages }} <tool_call>", "{{ tools }} <my_call>", "{# <tool_call> tools #}"],
)
def test_a_template_without_tools_or_of_no_known_family_is_told_in_words(template):
    assert AnswerFormat.of(ChatTemplate(template)) == AnswerFormat()


def test_no_template_no_format(tmp_path):
    assert AnswerFormat.load(tmp_path) == AnswerFormat()


@pytest.mark.parametrize("tail", ["<think>", "<think>\n"])
def test_a_template_that_opens_the_reasoning(tail):
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}{{ '" + tail + "' }}"
    found = AnswerFormat.of(ChatTemplate(template.replace("\n", "\\n")))
    assert (found.think, found.opened) == (THINK, True)
    assert found.opens_in("x" + tail)
    assert not found.opens_in(tail + "</think>\n\n")


# --- calls that must be made


END = 2  # <|im_end|> of SmolLM2


class Vocabulary:
    """A tokenizer, and llguidance's view of it."""

    def __init__(self, home: Path, *tokens: str) -> None:
        self.tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
        self.tokenizer.add_special_tokens(list(tokens))
        self.token_id = self.tokenizer.token_to_id
        self._guidance = llguidance.LLTokenizer(self.tokenizer.to_str(), eos_token=[END])

    def matcher(self, source: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._guidance, llguidance.LLMatcher.grammar_from_lark(source))
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def accepts(self, source: str, text: str) -> bool:
        """Whether the text is a whole answer."""
        matcher = self.matcher(source)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    def written(self, source: str, seed: int, limit: int = 300) -> str | None:
        """What a model that knows nothing writes: tokens at random, of those the grammar allows. None if it is cut."""
        matcher, draw, ids = self.matcher(source), random.Random(seed), []
        while not matcher.is_stopped() and len(ids) < limit:
            allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").nonzero()[0]
            if END in allowed:
                break
            ids.append(int(draw.choice(allowed)))
            assert matcher.consume_token(ids[-1])
        return self.tokenizer.decode(ids, skip_special_tokens=False) if len(ids) < limit else None


@pytest.fixture(scope="module", params=[False, True], ids=["text", "tokens"])
def vocabulary(request, smollm2_home):
    """SmolLM2's, to which the markers of all families are text; or, with them added, tokens."""
    marks = {mark for family in FAMILIES.values() for mark in family.marks}
    return Vocabulary(smollm2_home, *(sorted({*marks, *THINK}) if request.param else ()))


def check(schema: dict, value: object) -> None:
    """The few words of JSON schema that the schemas here use."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    schema = {**schema, **(DEFINITION if "$ref" in schema else {})}
    assert isinstance(value, kinds[schema["type"]])
    assert value in schema.get("enum", [value])
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= value.keys() <= schema.get("properties", value).keys()
        for key, item in value.items():
            check(schema["properties"][key], item)
    if isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 99)
        for item in value:
            check(schema["items"], item)


DEFINITION = {
    "type": "object",
    "properties": {"x": {"type": "number"}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}


def no_token(text: str) -> None:
    return None


SCHEMAS = {
    "search": {"type": "object", "properties": {"query": {"type": "string", "maxLength": 12}}, "required": ["query"]},
    "colour": {
        "type": "object",
        "properties": {
            "of": {"type": "string", "enum": ["red", 'a "b"', "日本"]},
            "shades": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["of", "shades"],
    },
    "point": {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/p"}},
        "required": ["at"],
        "$defs": {"p": DEFINITION},
    },
    "now": {"type": "object", "properties": {}},
}


def functions(**more: object) -> Tools:
    tools = parse_tools(
        {
            "tools": [
                {"type": "function", "function": {"name": name, "parameters": schema}}
                for name, schema in SCHEMAS.items()
            ],
            "tool_choice": "required",
            **more,
        }
    )
    assert tools is not None
    return tools


def calls_in(form: AnswerFormat, text: str, tools: Tools) -> list[tuple[str, dict]]:
    deltas = parsed(form, text, tools=tools)
    assert not [delta for delta in deltas if isinstance(delta, Content)], text
    arguments = [json.loads(delta.text) for delta in deltas if isinstance(delta, Arguments)]
    return list(zip([delta.name for delta in deltas if isinstance(delta, Call)], arguments, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_call_is_one_whatever_the_model(vocabulary, family):
    seen = set()
    for seed in range(12):
        name = list(SCHEMAS)[seed % len(SCHEMAS)]
        choice = {"type": "function", "function": {"name": name}} if seed < 8 else "required"
        tools = functions(tool_choice=choice)
        text = vocabulary.written(grammar(form(family), tools, vocabulary.token_id, thinking=False), seed)
        if text is None:  # a random number can be as long as it likes
            continue
        made = calls_in(form(family), text, tools)
        assert made
        for called, arguments in made:
            check(SCHEMAS[called], arguments)
            seen.add(called)
        if seed < 8:
            assert [called for called, _ in made] == [name]
    assert seen == set(SCHEMAS)


NOW = {
    "plain": ('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "\n"),
    "mistral": ('[TOOL_CALLS][{"name": "now", "arguments": {}}]', None),
    "mistral-named": ("[TOOL_CALLS]now[ARGS]{}", ""),
    "function-gemma": ("<start_function_call>call:now{}<end_function_call>", ""),
    "gemma-4": ("<|tool_call>call:now{}<tool_call|>", ""),
    "llama": ('{"name": "now", "parameters": {}}', None),
}


@pytest.mark.parametrize("family", NOW)
def test_how_many_calls_a_grammar_takes(vocabulary, family):
    one, separator = NOW[family]

    def takes(count: int, **more: object) -> bool:
        source = grammar(form(family), functions(**more), vocabulary.token_id, thinking=False)
        return vocabulary.accepts(source, (separator or "").join([one] * count))

    assert takes(1)
    assert not takes(0)
    assert takes(2) is takes(16) is (separator is not None)
    assert not takes(17)
    assert takes(1, parallel_tool_calls=False)
    assert not takes(2, parallel_tool_calls=False)
    assert not takes(2, tool_choice={"type": "function", "function": {"name": "now"}})


def test_reasoning_comes_before_a_forced_call(vocabulary):
    one, _ = NOW["plain"]
    thinking = form("plain", THINK)
    inside = grammar(thinking, functions(), vocabulary.token_id, thinking=True)
    assert vocabulary.accepts(inside, f"Hm.\n</think>\n\n{one}")
    assert not vocabulary.accepts(inside, one)
    assert not vocabulary.accepts(inside, "Hm.\n</think>\n\nNo.")
    outside = grammar(thinking, functions(), vocabulary.token_id, thinking=False)
    assert vocabulary.accepts(outside, f"<think>\nHm.</think>\n\n{one}")
    assert vocabulary.accepts(outside, one)
    assert not vocabulary.accepts(outside, "<think>Hm.</think> No.")


@pytest.mark.parametrize(
    ("structure", "good", "bad"),
    [
        (Structure("json_object"), '{"a": 1}', "words"),
        (Structure("json_schema", json.dumps(SCHEMAS["search"])), '{"query": "x"}', '{"q": 1}'),
        (Structure("regex", "a/b\\/c|d\n"), "a/b/c", "abc"),
        (Structure("regex", "a/b\\/c|d\n"), "d\n", "d"),
    ],
)
def test_an_answer_of_a_given_shape_or_calls(vocabulary, structure, good, bad):
    source = grammar(form("plain"), functions(), vocabulary.token_id, thinking=False, otherwise=structure)
    assert vocabulary.accepts(source, good)
    assert vocabulary.accepts(source, NOW["plain"][0])
    assert not vocabulary.accepts(source, bad)
    assert not vocabulary.accepts(source, good + NOW["plain"][0])


def test_what_cannot_be_forced_is_refused_by_name():
    bad = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}}
    tools = parse_tools(
        {
            "tools": [
                {"type": "function", "function": {"name": name, "parameters": schema}}
                for name, schema in [("now", {}), ("bad", bad)]
            ],
            "tool_choice": "required",
        }
    )
    assert tools is not None
    with pytest.raises(StageError, match="'tool_choice': 'auto'") as refused:
        grammar(form("plain"), tools, no_token, thinking=False)
    assert refused.value.param == "tools[1].function.parameters"
    with pytest.raises(StageError, match="write the calls into the grammar") as refused:
        grammar(form("plain"), functions(), no_token, thinking=False, otherwise=Structure("grammar", "start: /a/"))
    assert refused.value.param == "response_format"
    large = {"type": "object", "properties": {"a": {"type": "string", "description": "x" * 140_000}}}
    tools = parse_tools(
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": large}}], "tool_choice": "required"}
    )
    assert tools is not None
    with pytest.raises(StageError, match="too large") as refused:
        grammar(form("plain"), tools, no_token, thinking=False)
    assert refused.value.param == "tools"


# --- formats that the tokenizer declares

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
