"""The pictures of a chat whose messages are parsed: where each one is, and how many a pipeline takes.

Standard library only, and no look at what a URL leads to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipelines.errors import StageError


class ImagePart(NamedTuple):
    path: str  # of its url, for errors: messages[0].content[1].image_url.url
    url: str
    detail: str


def image_parts(messages: Sequence[Mapping[str, Any]]) -> list[ImagePart]:
    """In the order in which a prompt shows them."""
    found = []
    for index, message in enumerate(messages):
        content = message["content"]
        for place, part in enumerate(content if isinstance(content, list) else ()):
            if part["type"] == "image_url":
                image = part["image_url"]
                found.append(
                    ImagePart(f"messages[{index}].content[{place}].image_url.url", image["url"], image["detail"])
                )
    return found


def refuse_images(messages: Sequence[Mapping[str, Any]]) -> None:
    """For a pipeline whose model sees nothing."""
    check_count(messages, 0)


def check_count(messages: Sequence[Mapping[str, Any]], max_images: int) -> None:
    """Names the first part that is too many."""
    parts = image_parts(messages)
    if len(parts) <= max_images:
        return
    where = parts[max_images].path.removesuffix(".image_url.url") + ".type"
    if max_images == 0:
        raise StageError(f"'{where}' must be 'text', not 'image_url': this pipeline takes text only.", param=where)
    raise StageError(
        f"At most {max_images} image{'s' if max_images > 1 else ''} can be in a request to this pipeline, not "
        f"{len(parts)}: '{where}' is one too many.",
        param=where,
    )
