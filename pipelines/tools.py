"""The functions that a chat offers its model, in OpenAI's shape: checked once, the same from HTTP to the stages.

Standard library only, like `pipelines.messages`: the gateway refuses a bad request early, preprocess checks what direct
users send. Knows no template, no grammar and no model's way of writing a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.errors import StageError
from pipelines.messages import check_json, fields_of, kind_of, load_json, shown, string

MAX_FUNCTIONS = 128  # OpenAI: "A max of 128 functions are supported."
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
_REPLACED = {
    "functions": 'send \'tools\': [{"type": "function", "function": {…}}]',
    "function_call": "send 'tool_choice'",
}
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Function:
    """One function. `given` is its definition as it came, for templates; `parameters` its arguments' JSON schema."""

    name: str
    parameters: Mapping[str, Any]
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Tools:
    """What may be called, and what must be.

    `choice`: none, auto (the model decides) or required; `named` is the one function that must be called.
    """

    functions: tuple[Function, ...]
    choice: str = "auto"
    named: str | None = None
    parallel: bool = True

    @property
    def callable(self) -> tuple[Function, ...]:
        """What the model may call."""
        if self.choice == "none":
            return ()
        return tuple(function for function in self.functions if self.named in (None, function.name))

    @property
    def forced(self) -> bool:
        return self.choice == "required"

    @property
    def single(self) -> bool:
        """Whether an answer holds at most one call: OpenAI calls a named function once."""
        return self.named is not None or not self.parallel

    def to_json(self) -> str:
        """As the `tools` tensor holds it."""
        choice = {"type": "function", "function": {"name": self.named}} if self.named else self.choice
        tools = [{"type": "function", "function": function.given} for function in self.functions]
        return json.dumps({"tools": tools, "tool_choice": choice, "parallel_tool_calls": self.parallel})


def load_tools(text: str | bytes) -> Tools | None:
    """From the `tools` tensor."""
    fields = load_json(text, "tools")
    if not isinstance(fields, Mapping):
        raise StageError(
            f"'tools' must be a JSON object with {', '.join(_FIELDS)}, not {kind_of(fields)}.", param="tools"
        )
    for name in fields:
        if name not in _FIELDS:
            where = shown(name, quote="")
            raise StageError(
                f"'tools' has an unknown key '{where}'; it takes {', '.join(_FIELDS)}.",
                code="unsupported_parameter",
                param=where,
            )
    return parse_tools(fields)


def refuse_replaced(fields: Mapping[str, Any]) -> None:
    """OpenAI's names from before `tools`."""
    for name, remedy in _REPLACED.items():
        if fields.get(name) is not None:
            raise StageError(f"'{name}' is not supported: {remedy}.", code="unsupported_parameter", param=name)


def parse_tools(fields: Mapping[str, Any]) -> Tools | None:
    """From `tools`, `tool_choice` and `parallel_tool_calls`; None if no function is offered. A null is not given."""
    functions = _functions(fields.get("tools"))
    choice, named = _choice(fields.get("tool_choice"), functions)
    parallel = fields.get("parallel_tool_calls")
    if not isinstance(parallel, (bool, type(None))):
        raise StageError("'parallel_tool_calls' must be true or false.", param="parallel_tool_calls")
    if not functions:
        return None
    return Tools(functions, choice, named, parallel is not False)


def _functions(value: object) -> tuple[Function, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise StageError(f"'tools' must be a list of functions, not {kind_of(value)}.", param="tools")
    if len(value) > MAX_FUNCTIONS:
        raise StageError(f"'tools' takes at most {MAX_FUNCTIONS} functions, not {len(value)}.", param="tools")
    functions = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(value))
    seen: set[str] = set()
    for index, function in enumerate(functions):
        if function.name in seen:
            path = f"tools[{index}].function.name"
            raise StageError(f"'{path}': there is a function '{function.name}' already.", param=path)
        seen.add(function.name)
    return functions


def _tool(value: object, path: str) -> Function:
    given = fields_of(value, path, ("type", "function"))
    kind = string(given.get("type", ""), f"{path}.type")
    if kind != "function":
        raise StageError(f"'{path}.type' must be 'function', not {shown(kind)}.", param=f"{path}.type")
    path = f"{path}.function"
    if "function" not in given:
        raise StageError(f"'{path}' is required.", param=path)
    fields = fields_of(given["function"], path, ("name", "description", "parameters", "strict"))
    name = function_name(fields.get("name"), f"{path}.name")
    if "description" in fields:
        string(fields["description"], f"{path}.description")
    if not isinstance(fields.get("strict", False), bool):
        raise StageError(f"'{path}.strict' must be true or false.", param=f"{path}.strict")
    parameters = _parameters(fields.get("parameters"), f"{path}.parameters")
    return Function(name, parameters, {**fields, "parameters": parameters})


def _parameters(value: object, path: str) -> Mapping[str, Any]:
    if value is None:
        return _NO_ARGUMENTS
    if not isinstance(value, Mapping):
        raise StageError(f"'{path}' must be a JSON schema (an object), not {kind_of(value)}.", param=path)
    if value.get("type", "object") != "object":
        raise StageError(f"'{path}.type' must be 'object': arguments are named.", param=f"{path}.type")
    check_json(value, path)
    return value or _NO_ARGUMENTS


def _choice(value: object, functions: tuple[Function, ...]) -> tuple[str, str | None]:
    """The choice, and the one function that must be called."""
    if value is None:
        return "auto", None
    path = "tool_choice"
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise StageError(f"'{path}' must be none, auto, required or a function, not {shown(value)}.", param=path)
        named = None
    else:
        given = fields_of(value, path, ("type", "function"))
        kind = string(given.get("type", ""), f"{path}.type")
        if kind != "function":
            raise StageError(f"'{path}.type' must be 'function', not {shown(kind)}.", param=f"{path}.type")
        function = fields_of(given.get("function"), f"{path}.function", ("name",))
        path = f"{path}.function.name"
        named = function_name(function.get("name"), path)
        if functions and named not in {function.name for function in functions}:
            raise StageError(f"'{path}': no function '{named}' is in 'tools'.", param=path)
        value = "required"
    if value == "required" and not functions:
        raise StageError("'tool_choice' asks for a call, but 'tools' holds no function.", param="tool_choice")
    return value, named


def function_name(value: object, path: str) -> str:
    if value is None:
        raise StageError(f"'{path}' is required.", param=path)
    name = string(value, path)
    if not NAME.fullmatch(name):
        raise StageError(f"'{path}' must be 1 to 64 letters, digits, '_' and '-', not {shown(name)}.", param=path)
    return name
