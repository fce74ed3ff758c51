"""The shape an answer must have: OpenAI's `response_format`, and beside its kinds a regex and a grammar.

Pure JSON in and out, bounded in size and depth. Whether a schema, a regex or a grammar can be followed is not known
here: `grammar` asks llguidance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.errors import StageError

MAX_SOURCE = 128 * 1024  # characters; OpenAI takes 120,000 of names and values in a schema
MAX_DEPTH = 64  # of a schema; llguidance ends at 128
_PARAM = "response_format"
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True)
class Structure:
    """`source` is the schema as JSON text in its own order, the regex, or the grammar; json_object has none.

    OpenAI's `strict` is checked and not kept: a schema is always followed exactly, or refused.
    """

    kind: str
    source: str = ""

    @classmethod
    def parse(cls, given: Any) -> Structure | None:
        """From a `response_format`; `{"type": "text"}` is none."""
        if not isinstance(given, Mapping):
            raise _refused(f"'{_PARAM}' must be an object with a 'type'.")
        kind = given.get("type")
        if not isinstance(kind, str) or kind not in _TAKES:
            raise _refused(f"'{_PARAM}.type' must be one of {', '.join(_TAKES)}.")
        takes = _TAKES[kind]
        if unknown := sorted(given.keys() - {"type", takes}):
            raise _refused(f"'{_PARAM}' of type {kind} does not take '{unknown[0]}'.")
        if kind == "text":
            return None
        if kind == "json_object":
            return cls(kind)
        source = _schema(given.get(takes)) if kind == "json_schema" else _text(given.get(takes), kind)
        if len(source) > MAX_SOURCE:
            raise _refused(f"'{_PARAM}' is {len(source)} characters long; it takes {MAX_SOURCE} at most.")
        return cls(kind, source)

    def to_json(self) -> dict[str, Any]:
        """A `response_format` that parses to the same."""
        if self.kind == "json_object":
            return {"type": self.kind}
        inner = {"schema": json.loads(self.source)} if self.kind == "json_schema" else self.source
        return {"type": self.kind, _TAKES[self.kind]: inner}


# Each type, and the one key that may stand beside it ("type" once more: none).
_TAKES = {"text": "type", "json_object": "type", "json_schema": "json_schema", "regex": "regex", "grammar": "grammar"}


def _schema(given: Any) -> str:
    where = f"{_PARAM}.json_schema"
    if not isinstance(given, Mapping):
        raise _refused(f"'{where}' must be an object with a 'schema'.")
    if unknown := sorted(given.keys() - {"name", "description", "schema", "strict"}):
        raise _refused(f"'{where}' does not take '{unknown[0]}': it takes name, description, schema and strict.")
    name = given.get("name")
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise _refused(f"'{where}.name' must be 1 to 64 of a-z, A-Z, 0-9, _ and -.")
    if not isinstance(given.get("description", ""), str | None):
        raise _refused(f"'{where}.description' must be a string.")
    if not isinstance(given.get("strict"), bool | None):
        raise _refused(f"'{where}.strict' must be true or false.")
    schema = given.get("schema")
    if not isinstance(schema, Mapping):
        raise _refused(f"'{where}.schema' must be a JSON schema: an object.")
    if _too_deep(schema):
        raise _refused(f"'{where}.schema' is nested too deeply: it takes {MAX_DEPTH} levels.")
    try:
        return json.dumps(schema, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise _refused(f"'{where}.schema' must not hold NaN or Infinity.") from None


def _text(given: Any, kind: str) -> str:
    if not isinstance(given, str) or not given:
        raise _refused(f"'{_PARAM}.{kind}' must be a string that is not empty.")
    return given


def _too_deep(schema: Any) -> bool:
    """Level by level and not by recursion, which a hostile schema would exhaust."""
    level = [schema]
    for _ in range(MAX_DEPTH):
        parents = [value for value in level if isinstance(value, Mapping | list)]
        level = [child for value in parents for child in (value.values() if isinstance(value, Mapping) else value)]
        if not level:
            return False
    return True


def _refused(message: str) -> StageError:
    return StageError(message, param=_PARAM)
