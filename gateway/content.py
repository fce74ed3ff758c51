"""What was said, for a trace, where the operator has opted in: OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT.

Written as the GenAI conventions have it: messages with parts. Pictures are told as such and not held.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from gateway.backend import Stream
from gateway.choices import Arrival, Merged
from gateway.protocol import GenerationRequest

VARIABLE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
MOST = 32_768  # characters of a text; the rest is cut


def wanted(environ: Mapping[str, str] = os.environ) -> bool:
    return environ.get(VARIABLE, "").strip().lower() in ("true", "1", "span_only", "span_and_event")


def input_messages(request: GenerationRequest) -> str:
    """`gen_ai.input.messages`."""
    told: list[Mapping[str, Any]] = []
    for prompt in request.prompts:
        if "messages" in prompt:
            told += [_message(message) for message in orjson.loads(prompt["messages"])]  # type: ignore[arg-type]
        elif isinstance(text := prompt.get("text"), str):
            told.append({"role": "user", "parts": [_text(text)]})
    return _json(told)


def output_messages(texts: Sequence[str], finish_reasons: Sequence[str]) -> str:
    """`gen_ai.output.messages`: a message a choice, its text as the model wrote it."""
    reasons = [*finish_reasons, *[""] * (len(texts) - len(finish_reasons))]
    return _json(
        [
            {"role": "assistant", "parts": [_text(text)], **({"finish_reason": reason} if reason else {})}
            for text, reason in zip(texts, reasons, strict=False)
        ]
    )


class Heard(Merged):
    """The choices' streams, and what they have said so far."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        super().__init__(streams)
        self.texts = [""] * len(streams)

    async def accepted(self) -> list[Arrival]:
        return self._hear(await super().accepted()) if not self._only else await super().accepted()

    async def next(self) -> list[Arrival]:
        return self._hear(await super().next())

    def _hear(self, arrivals: list[Arrival]) -> list[Arrival]:
        for index, delta in arrivals:
            if len(self.texts[index]) <= MOST:
                self.texts[index] += "".join(delta.texts)
        return arrivals


def _message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content, role = message.get("content"), message.get("role", "user")
    if message.get("tool_call_id"):
        response = {"type": "tool_call_response", "id": message["tool_call_id"], "response": _cut(str(content))}
        return {"role": role, "parts": [response]}
    parts: list[Mapping[str, Any]] = []
    if isinstance(content, str):
        parts.append(_text(content))
    for part in content if isinstance(content, list) else ():
        parts.append(_text(part["text"]) if part.get("type") == "text" else {"type": "blob", "modality": "image"})
    for call in message.get("tool_calls") or ():
        function = call.get("function", {})
        arguments = _cut(str(function.get("arguments", "")))
        parts.append({"type": "tool_call", "id": call.get("id"), "name": function.get("name"), "arguments": arguments})
    return {"role": role, "parts": parts}


def _text(text: str) -> Mapping[str, str]:
    return {"type": "text", "content": _cut(text)}


def _cut(text: str) -> str:
    return text if len(text) <= MOST else text[:MOST] + "…"


def _json(value: Any) -> str:
    return str(orjson.dumps(value, default=str), "utf-8")
