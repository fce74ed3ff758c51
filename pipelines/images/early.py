"""Large pictures without their end, refused where a request comes in: Triton need not carry what cannot be read.

By the last bytes first, in which a whole JPEG or PNG says its end. Where it does not, the same reader is asked that the
preprocess stage would ask: this only spares the way there. Decodes no picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import pybase64

from pipelines.images.encoded import held
from pipelines.images.kinds import picture_format
from pipelines.images.parts import ImagePart
from pipelines.images.readers import read_header

_LARGE = 1 << 20  # characters: what is smaller is soon there
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_LOOKED_AT = 4096  # characters, of which four are three bytes


def refuse_cut_off(parts: Sequence[ImagePart]) -> None:
    for part in parts:
        if len(part.url) > _LARGE and _seems_cut_off(part.url):
            read_header(held(part.url, param=part.path, max_bytes=len(part.url)), param=part.path)


def _seems_cut_off(url: str) -> bool:
    """False of what is no data URI, or no base64: that is refused soon enough."""
    comma = url.find(",", 0, 256)
    try:
        start = pybase64.b64decode(url[comma + 1 : comma + 17])
        end = pybase64.b64decode(url[-_LOOKED_AT:])
    except ValueError:
        return False
    ending = _ENDS.get(picture_format(start))
    return url[:5].lower() == "data:" and ending is not None and ending not in end
