"""For a model that takes a question and a picture as they are: no chat template, no processor, the picture's pixels.

What stands in for both where the engine is `query`: `question` renders, `RawProcessor` makes ids and features. Knows no
model and no URL, and imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.errors import StageError
from pipelines.images.features import Features
from pipelines.spelling import Spelling

PICTURE = "picture"  # the one feature: UINT8 [height, width, 3]
_ONE_QUESTION = "this model answers one question at a time"


def question(messages: Sequence[Mapping[str, object]], tools: object = None) -> str:
    """The question that a chat is: the text of its only message, which is the user's.

    `messages` as `pipelines.messages` normalises them. Text parts are joined with line breaks, wherever the picture is.
    """
    if tools is not None:
        raise StageError(
            "'tools' is not supported by this model: its own code makes the prompt. Leave it out.",
            code="unsupported_parameter",
            param="tools",
        )
    for index, message in enumerate(messages):
        if message["role"] != "user":
            param = f"messages[{index}].role"
            raise StageError(f"'{param}' must be 'user': {_ONE_QUESTION}.", param=param)
    if len(messages) > 1:
        raise StageError(f"'messages' must hold one message: {_ONE_QUESTION}.", param="messages")
    content = messages[0]["content"]
    parts: list[dict[str, Any]] = content if isinstance(content, list) else [{"type": "text", "text": content}]
    pictures = [index for index, part in enumerate(parts) if part["type"] != "text"]
    if len(pictures) > 1:
        param = f"messages[0].content[{pictures[1]}]"
        raise StageError(f"'{param}' is a second picture: this model looks at one.", param=param)
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    if not text.strip():
        raise StageError("'messages[0].content' holds no text: ask a question.", param="messages[0].content")
    return text


@dataclass(frozen=True)
class RawProcessor:
    """Of the interface of `images.processor.Processor`."""

    spelling: Spelling
    image_token: str = ""  # none: the picture has no place in the question
    reserved: tuple[str, ...] = ()
    least_side: int | None = None  # the model is shown every pixel

    @classmethod
    def load(cls, home: Path) -> RawProcessor:
        """From a prepared folder; a ValueError says what it lacks. No code of the folder is run."""
        return cls(Spelling.load(home))

    def run(
        self, rendered: str, pictures: Sequence[Image.Image], *, param: str = "messages"
    ) -> tuple[list[int], Features | None]:
        ids = self.spelling.ids(rendered)
        if not pictures:
            return ids, None
        if len(pictures) > 1:
            raise StageError(f"This model looks at one picture; there are {len(pictures)}.", param=param)
        pixels = np.asarray(pictures[0].convert("RGB"))
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        number = int.from_bytes(digest[:8], "little") | -(2**63)
        return ids, Features({PICTURE: pixels}, [number, *ids[1:]])
