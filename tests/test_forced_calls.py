"""Calls that must be made: the grammars that force them."""

import json
import random
from pathlib import Path

import llguidance
import numpy as np
import pytest
from tokenizers import Tokenizer

from pipelines.answer.deltas import Arguments, Call, Content
from pipelines.answer.formats import AnswerFormat
from pipelines.answer.grammar import grammar
from pipelines.errors import StageError
from pipelines.structure import Structure
from pipelines.tools import Tools, parse_tools
from tests.test_answer import FAMILIES, THINK, form, parsed

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
