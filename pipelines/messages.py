"""OpenAI chat messages, checked once and normalised: every content is one string.

Standard library only: the gateway calls it to refuse a bad request early, the preprocess stage calls it
because people also call Triton directly. Knows no template and no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from pipelines.errors import StageError

ROLES = ("system", "developer", "user", "assistant", "tool")
_COMMON = frozenset({"role", "content", "name"})
_KEYS = {role: _COMMON | ({"tool_call_id"} if role == "tool" else set()) for role in ROLES}

# Parts join as vLLM and llama.cpp join them for templates that take a string, so a prompt means the same
# here.
_PART_SEPARATOR = "\n"


def load_messages(text: str | bytes) -> list[dict[str, object]]:
    """From the `messages` tensor: JSON, then `parse_messages`."""
    try:
        value = json.loads(utf8(text, "messages"))
    except (ValueError, RecursionError) as error:
        raise StageError(f"messages is not valid JSON: {_reason(error)}.", param="messages") from None
    return parse_messages(value)


def parse_messages(value: object) -> list[dict[str, object]]:
    """The same messages with string contents, or a StageError whose `param` is the path of what is wrong.

    A null is a key not given. Idempotent: what it returns may be parsed again.
    """
    if not isinstance(value, list):
        raise StageError(f"'messages' must be a list of messages, not {_kind(value)}.", param="messages")
    if not value:
        raise StageError("'messages' must hold at least one message.", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def utf8(text: str | bytes, param: str) -> str:
    """The text, if it is well-formed Unicode: no invalid byte, and no lone surrogate, which no tokenizer
    takes.
    """
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8")
        text.encode("utf-8")
    except UnicodeError as error:
        raise StageError(f"'{param}' is not valid Unicode: {_reason(error)}.", param=param) from None
    return text


def _message(value: object, path: str) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise StageError(f"'{path}' must be an object with role and content, not {_kind(value)}.", param=path)
    given = {key: item for key, item in value.items() if item is not None}
    role = _role(given, path)
    _refuse_unsupported(given, role, path)
    message: dict[str, object] = {"role": role, "content": _content(given, path)}
    if "name" in given:
        message["name"] = _string(given["name"], f"{path}.name")
    if role == "tool":
        if "tool_call_id" not in given:
            raise StageError(f"'{path}.tool_call_id' is required with role 'tool'.", param=f"{path}.tool_call_id")
        message["tool_call_id"] = _string(given["tool_call_id"], f"{path}.tool_call_id")
    return message


def _role(given: Mapping[str, object], path: str) -> str:
    if "role" not in given:
        raise StageError(f"'{path}.role' is required.", param=f"{path}.role")
    role = _string(given["role"], f"{path}.role")
    if role not in ROLES:
        raise StageError(f"'{path}.role' must be one of {', '.join(ROLES)}, not {_shown(role)}.", param=f"{path}.role")
    return role


def _refuse_unsupported(given: Mapping[str, object], role: str, path: str) -> None:
    if given.get("tool_calls") not in (None, []):
        raise StageError(
            f"'{path}.tool_calls' is not supported: pipelines here take and give text only.",
            code="unsupported_parameter",
            param=f"{path}.tool_calls",
        )
    for key in given:
        if key not in _KEYS[role] and key != "tool_calls":
            where = f"{path}.{_shown(key, quote='')}"
            raise StageError(
                f"'{where}' is not supported; a message with role '{role}' takes {', '.join(sorted(_KEYS[role]))}.",
                code="unsupported_parameter",
                param=where,
            )


def _content(given: Mapping[str, object], path: str) -> str:
    path = f"{path}.content"
    content = given.get("content")
    if content is None:
        raise StageError(f"'{path}' is required: a string, or a list of text parts.", param=path)
    if not isinstance(content, list):
        return _string(content, path, "a string or a list of text parts")
    if not content:
        raise StageError(f"'{path}' must hold at least one part.", param=path)
    return _PART_SEPARATOR.join(_part(part, f"{path}[{index}]") for index, part in enumerate(content))


def _part(value: object, path: str) -> str:
    if not isinstance(value, Mapping):
        raise StageError(f"'{path}' must be an object with type and text, not {_kind(value)}.", param=path)
    given = {key: item for key, item in value.items() if item is not None}
    kind = _string(given.get("type", ""), f"{path}.type")
    if kind != "text":
        raise StageError(
            f"'{path}.type' must be 'text', not {_shown(kind)}: this pipeline takes text only.",
            param=f"{path}.type",
        )
    if "text" not in given:
        raise StageError(f"'{path}.text' is required.", param=f"{path}.text")
    for key in given:
        if key not in ("type", "text"):
            where = f"{path}.{_shown(key, quote='')}"
            raise StageError(f"'{where}' is not supported.", code="unsupported_parameter", param=where)
    return _string(given["text"], f"{path}.text")


def _string(value: object, path: str, wanted: str = "a string") -> str:
    if not isinstance(value, str):
        raise StageError(f"'{path}' must be {wanted}, not {_kind(value)}.", param=path)
    return utf8(value, path)


_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}


def _kind(value: object) -> str:
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def _shown(value: object, quote: str = "'") -> str:
    """A user's own word in a message: short, and well-formed whatever it holds."""
    text = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return f"{quote}{text if len(text) <= 40 else text[:37] + '...'}{quote}"


def _reason(error: Exception) -> str:
    """What was wrong, without the text it was wrong in: a UnicodeError's own message quotes no more than a
    byte.
    """
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
