"""OpenAI's response objects: what a choice and a chunk hold, usage, models. Pure shapes: nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pipelines.answer import deltas as answer
from pipelines.logprobs import Alternative, Entry

Held: TypeAlias = Mapping[str, Any]  # what a choice holds beside its index and finish_reason


@dataclass(frozen=True)
class Head:
    """What every object of one response says of it."""

    id: str
    object: str
    created: int
    model: str

    def fields(self) -> dict[str, Any]:
        return {"id": self.id, "object": self.object, "created": self.created, "model": self.model}


def choice(index: int, held: Held, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, **held, "logprobs": held.get("logprobs"), "finish_reason": finish_reason}


def whole_response(head: Head, choices: Sequence[Mapping[str, Any]], used: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a request that does not stream."""
    return {**head.fields(), "choices": choices, "usage": used}


def chunk(
    head: Head, index: int, held: Held, *, finish_reason: str | None = None, usage_null: bool = False
) -> dict[str, Any]:
    """One chunk of a stream.

    OpenAI, include_usage: "All other chunks will also include a `usage` field, but with a null value."
    """
    found = {**head.fields(), "choices": [choice(index, held, finish_reason)]}
    return {**found, "usage": None} if usage_null else found


def usage_chunk(head: Head, used: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI, include_usage: "the `choices` field will always be an empty array"."""
    return {**head.fields(), "choices": [], "usage": used}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def message(deltas: Sequence[answer.Delta]) -> dict[str, Any]:
    """An assistant's message of all that an answer came to. OpenAI: `content` is null where there is none but calls.

    `annotations` are OpenAI's too, of a type that is ours.
    """
    content = "".join(delta.text for delta in deltas if isinstance(delta, answer.Content))
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, answer.Reasoning))
    calls = [delta for delta in deltas if isinstance(delta, answer.Call)]
    found: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if not content and (reasoning or calls):
        found["content"] = None
    if reasoning:
        found["reasoning_content"] = reasoning
    if calls:
        found["tool_calls"] = [_call(call, _arguments(call, deltas)) for call in calls]
    boxes = [box for delta in deltas if isinstance(delta, answer.Boxes) for box in delta.found]
    if boxes:
        found["annotations"] = [_annotation(box) for box in boxes]
    return found


def _annotation(box: answer.Box) -> dict[str, Any]:
    return {
        "type": "bounding_box",
        "text": box.text,
        "start_index": box.start,
        "end_index": box.end,
        "box": list(box.pixels),
        "image": box.picture,
    }


def _arguments(call: answer.Call, deltas: Sequence[answer.Delta]) -> str:
    pieces = (delta for delta in deltas if isinstance(delta, answer.Arguments))
    return "".join(delta.text for delta in pieces if delta.number == call.number)


def _call(call: answer.Call, arguments: str) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def message_delta(said: answer.Delta) -> dict[str, Any]:
    """A piece of that message, in a chunk."""
    if isinstance(said, answer.Content):
        return {"content": said.text}
    if isinstance(said, answer.Reasoning):
        return {"reasoning_content": said.text}
    if isinstance(said, answer.Call):
        return {"tool_calls": [{"index": said.number, **_call(said, "")}]}
    if isinstance(said, answer.Boxes):  # numbered like calls: clients add up a list's items by their index
        return {
            "annotations": [{"index": said.number + place, **_annotation(box)} for place, box in enumerate(said.found)]
        }
    return {"tool_calls": [{"index": said.number, "function": {"arguments": said.text}}]}


def chat_logprobs(entries: Sequence[Entry], offsets: Sequence[int]) -> dict[str, Any]:
    content = [
        {**_token(entry.token, entry.bytes, entry.logprob), "top_logprobs": [_token(*other) for other in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _token(token: str, data: list[int] | None, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": data}


def completion_logprobs(entries: Sequence[Entry], offsets: Sequence[int]) -> dict[str, Any]:
    """The older shape: lists side by side. `offsets`: where in the choice's text each token begins."""
    return {
        "tokens": [_legacy(entry.token, entry.bytes) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [_by_token(entry.top) for entry in entries],
        "text_offset": list(offsets),
    }


def _by_token(top: Sequence[Alternative]) -> dict[str, float]:
    """Tokens may share a text (a special one and its letters): the likelier is named."""
    found: dict[str, float] = {}
    for token, data, logprob in top:
        found.setdefault(_legacy(token, data), logprob)
    return found


def _legacy(token: str, data: list[int] | None) -> str:
    """OpenAI's older shape has no bytes, so a token that is no text says so."""
    return token if data is None or token.encode() == bytes(data) else f"bytes:{token}"


def model_object(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "triptych"}


def model_list(models: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": models}
