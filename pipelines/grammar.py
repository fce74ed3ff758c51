"""A structure compiled by llguidance, and what is wrong with one that cannot be.

Knows no request and no model, nor a model's vocabulary: `try_out` takes the tokenizer's special tokens alone,
and so needs none of the seconds and the memory that a large vocabulary takes. Tokens are followed by `constraint`.
A schema is followed exactly or refused: whatever llguidance would only approximate is an error that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from pipelines.errors import StageError
from pipelines.structure import Structure

# What the lexer and the parser may cost: 200,000 of fuel is some 14 ms a token, a state is 1 to 2 kB. The rest of
# llguidance's limits are its own. What it says when it fails is shown to users: without its state.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
# One space at most, where people and models write one: a small model that may write white space writes nothing else.
_JSON: Any = {
    "item_separator": ", ?",
    "key_separator": ": ?",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
}
_TEMPERATURE = re.compile(r"^[ \t]*[?!]?\w+[ \t]*\[[^\]\n]*\btemperature[ \t]*=", re.MULTILINE)
_SHOWN = 300


def compile_structure(structure: Structure) -> str:
    """The grammar in llguidance's words. That it can be parsed and followed is not known yet: see `check`."""
    try:
        if structure.kind == "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON)
        if structure.kind == "json_schema":
            if unenforced := next(_unenforced(json.loads(structure.source)), ""):
                raise refused(unenforced)
            return LLMatcher.grammar_from_json_schema(structure.source, overrides=_JSON)
        if structure.kind == "regex":
            return LLMatcher.grammar_from_regex(structure.source)
        if _TEMPERATURE.search(structure.source):
            raise refused("a rule's temperature is not taken: send 'temperature' beside 'response_format'")
        return LLMatcher.grammar_from_lark(structure.source)
    except ValueError as error:
        raise refused(str(error)) from None


def try_out(structure: Structure, special_tokens: Sequence[str] = ()) -> None:
    """A StageError if llguidance cannot follow it. A hostile one takes endlessly or ends the process: see `check`."""
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(special_tokens)))
    matcher = start(tokenizer, compile_structure(structure))
    # Some limits are met only by the first tokens: the first that may come is as good as any.
    for _ in range(2):
        bits = matcher.compute_bitmask()
        if matcher.is_error():
            raise refused(matcher.get_error())
        place = next((place for place, byte in enumerate(bits) if byte), None)
        if place is None or matcher.is_stopped():
            return
        matcher.consume_token(place * 8 + (bits[place] & -bits[place]).bit_length() - 1)


def start(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise refused(matcher.get_error())
    if warnings := matcher.get_grammar_warnings():  # a keyword it would leave out
        raise refused(warnings[0])
    return matcher


def refused(reason: str) -> StageError:
    """Of all that llguidance says, the beginning."""
    short = " ".join(reason.replace("<non-verbose/>", "").split())
    short = short if len(short) <= _SHOWN else short[: _SHOWN - 3] + "..."
    return StageError(
        f"'response_format' cannot be followed: {short.rstrip('.')}. Leave it out, or write it differently.",
        param="response_format",
    )


class _Bytes:
    """A tokenizer of one token a byte, as llguidance's TokenizerWrapper takes one."""

    bos_token_id = None

    def __init__(self, special_tokens: Sequence[str]) -> None:
        special = [token.encode() for token in special_tokens] + [b"</end>"]
        self.tokens = [bytes([byte]) for byte in range(256)] + [b"\xff" + token for token in special]
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.eos_token_id = len(self.tokens) - 1

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _unenforced(schema: Any) -> Iterator[str]:
    """What llguidance takes and does not hold to. Its own keywords among it: they would loosen ours."""
    if isinstance(schema, Mapping):
        if "x-guidance" in schema:
            yield 'Unimplemented keys: ["x-guidance"]'
        # The names of properties that a schema does not list may repeat, and then they count as one.
        least, required = schema.get("minProperties"), schema.get("required")
        named = len(required) if isinstance(required, list) else 0
        if isinstance(least, int) and least > named + 1:
            yield f'"minProperties": {least} with {named} required properties (it can be {named + 1} at most)'
        for key, value in schema.items():
            if key not in ("enum", "const", "default", "examples"):
                yield from _unenforced(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _unenforced(value)
