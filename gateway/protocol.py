"""The OpenAI protocol as pure functions: a body in, a request out; results in, response objects out.

Knows no HTTP, no server-sent events and no catalog: whether a model exists is not its question. No parameter
is dropped: it is honoured, or refused by name. Names do not change on the way (`max_tokens` stays that).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from pipelines.errors import StageError
from pipelines.messages import parse_messages
from pipelines.sampling import Sampling

MAX_DEPTH = 100  # of nested arrays and objects in a body; orjson itself stops at 1024
_MAX_SHOWN = 80  # characters of a client's own word in a message
_MAX_METADATA = 16  # OpenAI: "Set of 16 key-value pairs"; keys up to 64 characters, values up to 512
_MAX_METADATA_KEY = 64
_MAX_METADATA_VALUE = 512
_COMPLETION_MAX_TOKENS = 16  # OpenAI, completions, max_tokens: "Defaults to 16"

_SAMPLING = frozenset({"max_tokens", "temperature", "top_p", "seed", "stop"})
_COMMON = _SAMPLING | {"model", "stream", "stream_options", "user", "metadata"}


@dataclass(frozen=True)
class GenerationRequest:
    """One chat or completion, checked."""

    model: str
    inputs: Mapping[str, str]  # the orchestrator's: {"messages": json} or {"text": raw}
    sampling: Sampling
    stream: bool = False
    include_usage: bool = False
    user: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Head:
    """What every object of one response says of it."""

    id: str
    created: int
    model: str


@dataclass(frozen=True)
class Operation:
    """An endpoint that generates: what it takes, and the shapes of what it answers."""

    name: str  # as gen_ai.operation.name
    path: str
    id_prefix: str
    parameters: frozenset[str]
    sampling_defaults: Mapping[str, Any]
    inputs: Callable[[Mapping[str, Any]], Mapping[str, str]]
    object: str
    chunk_object: str
    whole: Callable[[str], Mapping[str, Any]]  # the text, as a choice holds it
    opening: Mapping[str, Any] | None  # what the choice of a stream's first chunk holds
    piece: Callable[[str], Mapping[str, Any]]  # a piece of text, as the choice of a chunk holds it
    closing: Mapping[str, Any]  # what the choice of the chunk with the finish_reason holds


def _chat_inputs(fields: Mapping[str, Any]) -> Mapping[str, str]:
    if fields.get("messages") is None:
        raise _missing("messages")
    return {"messages": orjson.dumps(parse_messages(fields["messages"])).decode()}


def _text_inputs(fields: Mapping[str, Any]) -> Mapping[str, str]:
    prompt = fields.get("prompt")
    if prompt is None:
        raise _missing("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise StageError("'prompt' must be a string, or a list holding exactly one string.", param="prompt")
    return {"text": prompt}


CHAT = Operation(
    name="chat",
    path="/v1/chat/completions",
    id_prefix="chatcmpl-",
    parameters=_COMMON | {"messages", "max_completion_tokens"},
    sampling_defaults={},
    inputs=_chat_inputs,
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    opening={"delta": {"role": "assistant", "content": ""}},
    piece=lambda text: {"delta": {"content": text}},
    closing={"delta": {}},
)

COMPLETION = Operation(
    name="text_completion",
    path="/v1/completions",
    id_prefix="cmpl-",
    parameters=_COMMON | {"prompt"},
    sampling_defaults={"max_tokens": _COMPLETION_MAX_TOKENS},
    inputs=_text_inputs,
    object="text_completion",
    chunk_object="text_completion",
    whole=lambda text: {"text": text},
    opening=None,
    piece=lambda text: {"text": text},
    closing={"text": ""},
)


def parse_request(operation: Operation, body: bytes) -> GenerationRequest:
    """The request in a body. A bad one is a StageError that names its parameter."""
    given = {name: value for name, value in parse_object(body).items() if value is not None}
    model = given.get("model")
    if model is None:
        raise _missing("model")
    if not isinstance(model, str):
        raise StageError("'model' must be a string.", param="model")
    for name in given:
        if name not in operation.parameters:
            raise _unsupported(name)
    stream = _boolean(given, "stream")
    sampling = {name: given[name] for name in (*_SAMPLING, "max_completion_tokens") if name in given}
    return GenerationRequest(
        model=model,
        inputs=operation.inputs(given),
        sampling=Sampling.parse({**operation.sampling_defaults, **sampling}),
        stream=stream,
        include_usage=_include_usage(given, stream),
        user=_user(given),
        metadata=_metadata(given),
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds, nested no deeper than anything that comes after can bear."""
    try:
        value = orjson.loads(body)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise StageError(f"The request body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise StageError("The request body must be a JSON object.")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise StageError(f"The request body is nested more than {MAX_DEPTH} levels deep.")
    return value


def new_head(operation: Operation, model: str) -> Head:
    return Head(operation.id_prefix + os.urandom(15).hex(), int(time.time()), model)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def whole_response(
    operation: Operation, head: Head, text: str, finish_reason: str, used: Mapping[str, int]
) -> dict[str, Any]:
    """The answer of a request that does not stream."""
    return {
        "id": head.id,
        "object": operation.object,
        "created": head.created,
        "model": head.model,
        "choices": [{"index": 0, **operation.whole(text), "logprobs": None, "finish_reason": finish_reason}],
        "usage": used,
    }


def chunk(
    operation: Operation,
    head: Head,
    held: Mapping[str, Any],
    *,
    finish_reason: str | None = None,
    usage_null: bool = False,
) -> dict[str, Any]:
    """One chunk of a stream; `held` is an operation's opening, piece or closing.

    OpenAI, include_usage: "All other chunks will also include a `usage` field, but with a null value."
    """
    choice = {"index": 0, **held, "logprobs": None, "finish_reason": finish_reason}
    return _chunk(operation, head, [choice], {"usage": None} if usage_null else {})


def usage_chunk(operation: Operation, head: Head, used: Mapping[str, int]) -> dict[str, Any]:
    """OpenAI, include_usage: "the `choices` field will always be an empty array"."""
    return _chunk(operation, head, [], {"usage": used})


def model_object(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "triptych"}


def model_list(names: list[str], created: int) -> dict[str, Any]:
    return {"object": "list", "data": [model_object(name, created) for name in names]}


def _chunk(operation: Operation, head: Head, choices: list[Any], more: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": operation.chunk_object,
        "created": head.created,
        "model": head.model,
        "choices": choices,
        **more,
    }


def _missing(name: str) -> StageError:
    return StageError(f"Missing required parameter: '{name}'.", param=name)


def _unsupported(name: str) -> StageError:
    shown = name if len(name) <= _MAX_SHOWN else name[: _MAX_SHOWN - 3] + "..."
    return StageError(f"Unsupported parameter: '{shown}'.", code="unsupported_parameter", param=shown)


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise StageError(f"'{name}' must be true or false.", param=name)
    return value


def _include_usage(fields: Mapping[str, Any], stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not stream:
        # OpenAI: "Only set this when you set `stream: true`."
        raise StageError("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    if not isinstance(options, dict):
        raise StageError("'stream_options' must be an object.", param="stream_options")
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name != "include_usage":
            raise _unsupported(f"stream_options.{name}")
    value = options.get("include_usage", False)
    if not isinstance(value, bool):
        name = "stream_options.include_usage"
        raise StageError(f"'{name}' must be true or false.", param=name)
    return value


def _user(fields: Mapping[str, Any]) -> str | None:
    user = fields.get("user")
    if user is not None and not isinstance(user, str):
        raise StageError("'user' must be a string.", param="user")
    return user


def _metadata(fields: Mapping[str, Any]) -> Mapping[str, str]:
    metadata = fields.get("metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StageError("'metadata' must be an object whose values are strings.", param="metadata")
    if len(metadata) > _MAX_METADATA:
        message = f"'metadata' takes at most {_MAX_METADATA} pairs, not {len(metadata)}."
        raise StageError(message, param="metadata")
    for key, value in metadata.items():
        if len(key) > _MAX_METADATA_KEY or len(value) > _MAX_METADATA_VALUE:
            limits = f"{_MAX_METADATA_KEY} characters and values of up to {_MAX_METADATA_VALUE}"
            raise StageError(f"'metadata' takes keys of up to {limits}.", param="metadata")
    return metadata


def _deeper_than(value: Any, limit: int) -> bool:
    """Level by level, because recursion is what deep bodies are sent to exhaust."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
