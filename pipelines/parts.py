"""Contents that are parts, words and pictures in order: in the shape that a chat template takes them.

A template of transformers is given `{"type": "text", "text": …}` and `{"type": "image"}`. Some take every content as
such parts, those of text models none; which, rendering a probe says. Knows no picture and no processor: what stands for
one in a prompt is a word that the caller names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from pipelines.errors import StageError
from pipelines.template import ChatTemplate

Message: TypeAlias = dict[str, Any]
Content: TypeAlias = str | list[dict[str, Any]]

_PART_SEPARATOR = "\n"  # as in `messages`, which joins parts that are all text


def check(chat: Sequence[Message], reserved: Sequence[str]) -> None:
    """That no text holds a word which the model would take for a picture; a StageError names the one that does."""
    for index, message in enumerate(chat):
        for key in ("content", "reasoning_content", "name", "tool_calls"):
            for path, text in _texts(message.get(key), f"messages[{index}].{key}"):
                for word in reserved:
                    if word in text:
                        raise StageError(
                            f"'{path}' holds {word!r}, which stands for a picture, a video or a sound in this "
                            "model's prompts: write it another way, with a space inside for example.",
                            param=path,
                        )


def joined(first: Content, separator: str, second: Content) -> Content:
    """One content after another: `separator` is between two texts, and left out beside a picture."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}{separator}{second}"
    before, after = _as_parts(first), _as_parts(second)
    if before and after and before[-1]["type"] == after[0]["type"] == "text":
        before, after = before[:-1], [_text(f"{before[-1]['text']}{separator}{after[0]['text']}"), *after[1:]]
    return before + after


def fitted(chat: Sequence[Message], template: ChatTemplate, image_token: str | None) -> list[Message]:
    """The same chat for this template: strings, or parts, or pictures in words, which are `image_token`."""
    seen = [index for index, message in enumerate(chat) if isinstance(message.get("content"), list)]
    if seen and image_token is None:
        path = f"messages[{seen[0]}].content"
        raise StageError(f"'{path}' holds a picture: this pipeline takes text only.", param=path)
    # A template may take parts, and leave out those that are no text.
    in_parts = bool(seen) and template.takes_parts and (not image_token or template.places(image_token))
    strings = template.takes_strings
    fit = []
    for message in chat:
        content = message.get("content")
        if isinstance(content, list) and not in_parts:
            content = _in_words(content, image_token or "")
        if isinstance(content, str) and not strings:
            content = [_text(content)]
        elif isinstance(content, list):
            content = [_text(part["text"]) if part["type"] == "text" else {"type": "image"} for part in content]
        fit.append({**message, "content": content} if "content" in message else message)
    return fit


def _in_words(content: list[dict[str, Any]], image_token: str) -> str:
    words = [part["text"] if part["type"] == "text" else image_token for part in content]
    return _PART_SEPARATOR.join(word for word in words if word)


def _as_parts(content: Content) -> list[dict[str, Any]]:
    return [_text(content)] if isinstance(content, str) else list(content)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _texts(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Every text in a value, and where it is. What a part says of its picture is none."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{path}[{index}]")
    elif isinstance(value, dict) and value.get("type") != "image_url":
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}")
