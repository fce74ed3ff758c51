"""A request's body, parameter by parameter: each is checked by a function here, and a bad one is named.

Knows no HTTP and no response. What sampling is about is `pipelines.sampling`'s to check; what of it has another shape
at an endpoint gets its one shape here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import orjson

from pipelines.errors import StageError
from pipelines.messages import parse_messages
from pipelines.terms import MAX_PRIORITY, whole_number

MAX_DEPTH = 100  # of nested arrays and objects in a body; orjson itself stops at 1024
MAX_COMPLETION_LOGPROBS = 5  # OpenAI, completions, logprobs: "The maximum value for `logprobs` is 5"
_SHORT_BODY = 1024 * 1024  # where to count brackets is cheaper than to walk; longer ones have pictures in them
MAX_KEEP_ALIVE = 10**9  # that a body can name; TRIPTYCH_MAX_KEEP_ALIVE is what it gets at most
_MAX_SHOWN = 80  # characters of a client's own word in a message
_MAX_METADATA = 16  # OpenAI: "Set of 16 key-value pairs"; keys up to 64 characters, values up to 512
_MAX_METADATA_KEY = 64
_MAX_METADATA_VALUE = 512

Inputs: TypeAlias = Mapping[
    str, "str | bytes | list[int]"
]  # the orchestrator's: {"messages": json}, {"text": …}, {"text_ids": …}

# OpenAI's parameters that are taken with these values only, which say what is so anyway.
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "modalities": (["text"],),
    "store": (False,),
}


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds, nested no deeper than anything that comes after can bear."""
    try:
        value = orjson.loads(body)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise StageError(f"The request body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise StageError("The request body must be a JSON object.")
    shallow = len(body) <= _SHORT_BODY and body.count(b"[") + body.count(b"{") <= MAX_DEPTH
    if not shallow and deeper_than(value, MAX_DEPTH):
        raise StageError(f"The request body is nested more than {MAX_DEPTH} levels deep.")
    return value


class Prompts(NamedTuple):
    """What a body asks to be continued, and the messages of a chat, parsed."""

    inputs: list[Inputs]
    messages: Sequence[Mapping[str, Any]] = ()


def chat_prompts(given: Mapping[str, Any]) -> Prompts:
    if given.get("messages") is None:
        raise missing("messages")
    messages = parse_messages(given["messages"])
    return Prompts([{"messages": orjson.dumps(messages)}], messages)


def completion_prompts(given: Mapping[str, Any]) -> Prompts:
    """OpenAI, prompt: "encoded as a string, array of strings, array of tokens, or array of token arrays"."""
    prompt = given.get("prompt")
    if prompt is None:
        raise missing("prompt")
    several = isinstance(prompt, list) and bool(prompt) and not _is_id(prompt[0])
    return Prompts([_prompt(one) for one in (prompt if several else [prompt])])


def _prompt(prompt: Any) -> Inputs:
    if isinstance(prompt, str):
        return {"text": prompt}
    if isinstance(prompt, list) and prompt and all(map(_is_id, prompt)):
        return {"text_ids": prompt}
    raise StageError("'prompt' must be a string, a list of token ids, or a list of such prompts.", param="prompt")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def completion_logprobs(given: Mapping[str, Any]) -> dict[str, Any]:
    """The number of alternatives, as the sampling has it: whether, and how many."""
    if "logprobs" not in given:
        return {}
    count = whole_number(given, "logprobs", 0, MAX_COMPLETION_LOGPROBS)
    return {"logprobs": True, "top_logprobs": count}


def refuse_all_but_harmless(given: Mapping[str, Any]) -> None:
    for name, harmless in HARMLESS.items():
        if name in given and not any(type(given[name]) is type(value) and given[name] == value for value in harmless):
            values = " or ".join(orjson.dumps(value).decode() for value in harmless)
            raise StageError(
                f"Unsupported value: '{name}' can only be {values} here.", code="unsupported_parameter", param=name
            )


def choices(given: Mapping[str, Any], prompts: int, most: int) -> int:
    """`n`: how many answers to each prompt. All the choices of a request are `most` at most."""
    n = whole_number(given, "n", 1, most) if "n" in given else 1
    if n * prompts > most:
        param = "n" if n > 1 else "prompt"
        message = f"'{param}' asks for {n * prompts} choices ({prompts} prompts, {n} of each); {most} are allowed."
        raise StageError(message, param=param)
    return n


def priority(given: Mapping[str, Any]) -> int:
    return whole_number(given, "priority", -MAX_PRIORITY, MAX_PRIORITY) if "priority" in given else 0


def batch(given: Mapping[str, Any]) -> bool:
    """OpenAI, service_tier: flex is for what is not urgent; the others are all the same here."""
    tier = given.get("service_tier", "auto")
    if tier not in ("auto", "default", "flex"):
        message = 'Unsupported value: \'service_tier\' can only be "auto" or "default" or "flex" here.'
        raise StageError(message, code="unsupported_parameter", param="service_tier")
    return bool(tier == "flex")


def keep_alive(given: Mapping[str, Any]) -> int | None:
    """Seconds for which the pipeline stays after the request; None: as its file says."""
    return whole_number(given, "keep_alive", 0, MAX_KEEP_ALIVE) if "keep_alive" in given else None


def boolean(fields: Mapping[str, Any], name: str, within: str = "") -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise StageError(f"'{within}{name}' must be true or false.", param=within + name)
    return value


def stream_options(given: Mapping[str, Any], stream: bool) -> tuple[bool, bool]:
    """Whether the usage is wanted, and whether the timing: that is in the usage's chunk, so it brings it along."""
    options = given.get("stream_options")
    if options is None:
        return False, False
    if not stream:
        # OpenAI: "Only set this when you set `stream: true`."
        raise StageError("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    if not isinstance(options, dict):
        raise StageError("'stream_options' must be an object.", param="stream_options")
    options = {name: value for name, value in options.items() if value is not None}
    for name, value in options.items():
        # No chunk here has an `obfuscation`: false asks for what is so.
        if name not in ("include_usage", "include_timing") and (name, value) != ("include_obfuscation", False):
            raise unsupported(f"stream_options.{name}")
    timing = boolean(options, "include_timing", within="stream_options.")
    return boolean(options, "include_usage", within="stream_options.") or timing, timing


def user(given: Mapping[str, Any]) -> str | None:
    name = given.get("user")
    if name is not None and not isinstance(name, str):
        raise StageError("'user' must be a string.", param="user")
    return name


def metadata(given: Mapping[str, Any]) -> Mapping[str, str]:
    pairs = given.get("metadata", {})
    if not isinstance(pairs, dict) or not all(isinstance(value, str) for value in pairs.values()):
        raise StageError("'metadata' must be an object whose values are strings.", param="metadata")
    if len(pairs) > _MAX_METADATA:
        raise StageError(f"'metadata' takes at most {_MAX_METADATA} pairs, not {len(pairs)}.", param="metadata")
    for key, value in pairs.items():
        if len(key) > _MAX_METADATA_KEY or len(value) > _MAX_METADATA_VALUE:
            limits = f"{_MAX_METADATA_KEY} characters and values of up to {_MAX_METADATA_VALUE}"
            raise StageError(f"'metadata' takes keys of up to {limits}.", param="metadata")
    return pairs


def missing(name: str) -> StageError:
    return StageError(f"Missing required parameter: '{name}'.", param=name)


def unsupported(name: str) -> StageError:
    shown = name if len(name) <= _MAX_SHOWN else name[: _MAX_SHOWN - 3] + "..."
    return StageError(f"Unsupported parameter: '{shown}'.", code="unsupported_parameter", param=shown)


def deeper_than(value: Any, limit: int) -> bool:
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
