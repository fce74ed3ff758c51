"""OpenAI chat messages, checked once and normalised: a content is one string, or a list of parts where a picture is
among them; every argument text is a JSON object.

Standard library only: the gateway calls it to refuse a bad request early, the preprocess stage calls it
because people also call Triton directly. Knows no template and no tokenizer, and of a picture only where it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipelines.errors import StageError

# What is asked of parsed messages that hold pictures.
from pipelines.images.parts import ImagePart as ImagePart
from pipelines.images.parts import check_count as check_count
from pipelines.images.parts import image_parts as image_parts
from pipelines.images.parts import refuse_images as refuse_images

ROLES = ("system", "developer", "user", "assistant", "tool")
_COMMON = frozenset({"role", "content", "name"})
# What the official client adds to an answer that it has streamed or parsed: sent back, it says nothing new.
_ADDED_TO_MESSAGE = "parsed"
_ADDED_TO_CALL = "index"
_ADDED_TO_FUNCTION = "parsed_arguments"
_MORE = {"tool": {"tool_call_id"}, "assistant": {"tool_calls", "reasoning_content"}}
_KEYS = {role: _COMMON | _MORE.get(role, set()) for role in ROLES}

# Parts join as vLLM and llama.cpp join them for templates that take a string, so a prompt means the same
# here.
_PART_SEPARATOR = "\n"
DETAILS = ("auto", "low", "high")


def load_messages(text: str | bytes) -> list[dict[str, object]]:
    """From the `messages` tensor: JSON, then `parse_messages`."""
    return parse_messages(load_json(text, "messages"))


def load_json(text: str | bytes, param: str) -> Any:
    """What a tensor with JSON in it holds."""
    try:
        return json.loads(utf8(text, param))
    except (ValueError, RecursionError) as error:
        raise StageError(f"{param} is not valid JSON: {_reason(error)}.", param=param) from None


def parse_messages(value: object) -> list[dict[str, object]]:
    """The same messages with normalised contents, or a StageError whose `param` is the path of what is wrong.

    A null is a key not given. Idempotent: what it returns may be parsed again.
    """
    if not isinstance(value, list):
        raise StageError(f"'messages' must be a list of messages, not {kind_of(value)}.", param="messages")
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
        if not text.isascii():  # a picture's megabytes are, and need no looking through
            text.encode("utf-8")
    except UnicodeError as error:
        raise StageError(f"'{param}' is not valid Unicode: {_reason(error)}.", param=param) from None
    return text


def check_json(value: object, path: str) -> None:
    """What may be written as JSON again: an escape can spell a lone surrogate, and NaN is none."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise StageError(f"'{path}' is not valid JSON: {_reason(error)}.", param=path) from None
    utf8(text, path)


def _message(value: object, path: str) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise StageError(f"'{path}' must be an object with role and content, not {kind_of(value)}.", param=path)
    given = {key: item for key, item in value.items() if item is not None}
    role = _role(given, path)
    if role == "assistant":
        given.pop(_ADDED_TO_MESSAGE, None)
    _refuse_unsupported(given, role, path)
    calls = _calls(given.get("tool_calls"), f"{path}.tool_calls")
    message: dict[str, object] = {"role": role, "content": _content(given, role, path, needed=not calls)}
    for key in ("name", "reasoning_content"):
        if key in given:
            message[key] = string(given[key], f"{path}.{key}")
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        if "tool_call_id" not in given:
            raise StageError(f"'{path}.tool_call_id' is required with role 'tool'.", param=f"{path}.tool_call_id")
        message["tool_call_id"] = string(given["tool_call_id"], f"{path}.tool_call_id")
    return message


def _role(given: Mapping[str, object], path: str) -> str:
    if "role" not in given:
        raise StageError(f"'{path}.role' is required.", param=f"{path}.role")
    role = string(given["role"], f"{path}.role")
    if role not in ROLES:
        raise StageError(f"'{path}.role' must be one of {', '.join(ROLES)}, not {shown(role)}.", param=f"{path}.role")
    return role


def _refuse_unsupported(given: Mapping[str, object], role: str, path: str) -> None:
    if "function_call" in given:
        where = f"{path}.function_call"
        raise StageError(f"'{where}' is not supported: send 'tool_calls'.", code="unsupported_parameter", param=where)
    for key in given:
        if key not in _KEYS[role] and not (key == "tool_calls" and given[key] == []):
            where = f"{path}.{shown(key, quote='')}"
            raise StageError(
                f"'{where}' is not supported; a message with role '{role}' takes {', '.join(sorted(_KEYS[role]))}.",
                code="unsupported_parameter",
                param=where,
            )


def _calls(value: object, path: str) -> list[dict[str, object]]:
    """The calls of an assistant's message, as OpenAI writes them: `arguments` is a text."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise StageError(f"'{path}' must be a list of calls, not {kind_of(value)}.", param=path)
    return [_call(call, f"{path}[{index}]") for index, call in enumerate(value)]


def _call(value: object, path: str) -> dict[str, object]:
    given = fields_of(value, path, ("id", "type", "function"), left_out=_ADDED_TO_CALL)
    kind = string(given.get("type", "function"), f"{path}.type")
    if kind != "function":
        raise StageError(f"'{path}.type' must be 'function', not {shown(kind)}.", param=f"{path}.type")
    for key in ("id", "function"):
        if key not in given:
            raise StageError(f"'{path}.{key}' is required.", param=f"{path}.{key}")
    function = fields_of(given["function"], f"{path}.function", ("name", "arguments"), left_out=_ADDED_TO_FUNCTION)
    if "name" not in function:
        raise StageError(f"'{path}.function.name' is required.", param=f"{path}.function.name")
    return {
        "id": string(given["id"], f"{path}.id"),
        "type": "function",
        "function": {
            "name": string(function["name"], f"{path}.function.name"),
            "arguments": _arguments(function.get("arguments", ""), f"{path}.function.arguments"),
        },
    }


def _arguments(value: object, path: str) -> str:
    """The JSON text of an object; an empty text is a call without arguments."""
    text = string(value, path, "a string that holds a JSON object")
    if not text.strip():
        return "{}"
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StageError(f"'{path}' is not valid JSON: {_reason(error)}.", param=path) from None
    if not isinstance(arguments, dict):
        raise StageError(f"'{path}' must hold a JSON object, not {kind_of(arguments)}.", param=path)
    check_json(arguments, path)
    return text


def fields_of(value: object, path: str, keys: tuple[str, ...], left_out: str = "") -> dict[str, Any]:
    """The given keys of an object that may hold these, one to leave out, and no others."""
    if not isinstance(value, Mapping):
        raise StageError(f"'{path}' must be an object with {' and '.join(keys)}, not {kind_of(value)}.", param=path)
    given = {key: item for key, item in value.items() if item is not None and key != left_out}
    for key in given:
        if key not in keys:
            where = f"{path}.{shown(key, quote='')}"
            raise StageError(
                f"'{where}' is not supported; '{path}' takes {', '.join(keys)}.",
                code="unsupported_parameter",
                param=where,
            )
    return given


def _content(given: Mapping[str, object], role: str, path: str, needed: bool) -> str | list[dict[str, Any]] | None:
    """None only where the message is its calls; a list only where it holds a picture."""
    path = f"{path}.content"
    content = given.get("content")
    if content is None and not needed:
        return None
    if content is None:
        raise StageError(f"'{path}' is required: a string, or a list of parts.", param=path)
    if not isinstance(content, list):
        return string(content, path, "a string or a list of parts")
    if not content:
        raise StageError(f"'{path}' must hold at least one part.", param=path)
    parts = [_part(part, role, f"{path}[{index}]") for index, part in enumerate(content)]
    if any(part["type"] == "image_url" for part in parts):
        return parts
    return _PART_SEPARATOR.join(part["text"] for part in parts)


def _part(value: object, role: str, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise StageError(f"'{path}' must be an object with type and its value, not {kind_of(value)}.", param=path)
    kind = string({key: item for key, item in value.items() if item is not None}.get("type", ""), f"{path}.type")
    if kind == "image_url" and role != "user":
        raise StageError(
            f"'{path}.type' must be 'text', not 'image_url': pictures go in messages with role 'user'.",
            param=f"{path}.type",
        )
    if kind not in ("text", "image_url"):
        raise StageError(f"'{path}.type' must be 'text' or 'image_url', not {shown(kind)}.", param=f"{path}.type")
    given = fields_of(value, path, ("type", kind))
    if kind not in given:
        raise StageError(f"'{path}.{kind}' is required.", param=f"{path}.{kind}")
    inner = f"{path}.{kind}"
    return {"type": kind, kind: string(given[kind], inner) if kind == "text" else _image_url(given[kind], inner)}


def _image_url(value: object, path: str) -> dict[str, str]:
    """Where the picture is; what is there is for the preprocess stage to say."""
    if isinstance(value, str):
        raise StageError(f'\'{path}\' must be an object: send {{"url": "..."}}, not the URL alone.', param=path)
    given = fields_of(value, path, ("url", "detail"))
    url = string(given.get("url", ""), f"{path}.url", "a string: a data URI, or an http or https URL")
    if not url:
        raise StageError(f"'{path}.url' is required: a data URI, or an http or https URL.", param=f"{path}.url")
    detail = string(given.get("detail", DETAILS[0]), f"{path}.detail")
    if detail not in DETAILS:
        raise StageError(
            f"'{path}.detail' must be one of {', '.join(DETAILS)}, not {shown(detail)}.", param=f"{path}.detail"
        )
    return {"url": url, "detail": detail}


def string(value: object, path: str, wanted: str = "a string") -> str:
    if not isinstance(value, str):
        raise StageError(f"'{path}' must be {wanted}, not {kind_of(value)}.", param=path)
    return utf8(value, path)


_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}


def kind_of(value: object) -> str:
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def shown(value: object, quote: str = "'") -> str:
    """A user's own word in a message: short, and well-formed whatever it holds."""
    text = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return f"{quote}{text if len(text) <= 40 else text[:37] + '...'}{quote}"


def _reason(error: Exception) -> str:
    """What was wrong, without the text it was wrong in: a UnicodeError's own message quotes no more than a
    byte.
    """
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
