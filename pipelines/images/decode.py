"""Encoded bytes to a picture as a person sees it: its header first, its pixels when there is memory for them.

Pillow decodes, and sees only bytes whose header one of our readers has found bearable. Knows no request: the part of
one that a picture came from is a name for errors.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import (  # the plugins register themselves, here and not under the first request
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from pipelines.errors import StageError
from pipelines.images import kinds
from pipelines.images.colour import as_seen
from pipelines.images.header import Header, Unreadable
from pipelines.images.readers import read_header, refusal

# Its own limit is one for the process, half a warning and half an error; ours comes first, and is the pipeline's.
Image.MAX_IMAGE_PIXELS = None

MAX_SIDE = 65_500  # libjpeg's own; nothing that a person looks at is longer
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = 5  # this turn and those after it swap width and height
# At the worst moment of decoding, with the result: measured, and held by the tests.
_BYTES_A_PIXEL = {"JPEG": 12, "PNG": 20, "GIF": 16, "BMP": 20, "TIFF": 24, "WEBP": 28}
_REDUCTIONS = (8, 4, 2)


def open_picture(data: bytes, *, param: str, max_pixels: int) -> Picture:
    """Its header, read and found bearable; nothing is decoded. StageError names `param`."""
    header = read_header(data, param=param)
    width, height = header.size
    if not width or not height:
        raise refusal(param, f"is {width} x {height}: a picture needs pixels")
    if width * height > max_pixels:
        raise refusal(
            param, f"has {width} x {height} pixels, more than the {max_pixels} that are taken: send a smaller one"
        )
    if max(width, height) > MAX_SIDE:
        raise refusal(param, f"is {width} x {height}: no side may be longer than {MAX_SIDE}")
    return Picture(header, param)


@dataclass(frozen=True)
class Picture:
    """A picture whose header is bearable. Threads may decode it, and others, at the same time."""

    header: Header
    param: str

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), turned as it is seen."""
        width, height = self.header.size
        return (height, width) if self.header.orientation >= _SIDEWAYS else (width, height)

    @property
    def bytes_needed(self) -> int:
        return self.bytes_for(None)

    def bytes_for(self, least: int | None) -> int:
        """What `decode(least)` takes at most, with its result."""
        width, height = self.header.size
        reduction = self._reduction(least)
        pixels = -(-width // reduction) * -(-height // reduction)
        return pixels * _BYTES_A_PIXEL[self.header.format] + self.header.buffered

    def decode(self, least: int | None = None) -> Image.Image:
        """RGB as it is seen. With `least`, a JPEG may be decoded to a half, a quarter or an eighth of its size, as long
        as neither side becomes shorter than that.
        """
        try:
            image = self._decoded(least)
            turn = _TURNS.get(self.header.orientation)
            return image if turn is None else image.transpose(turn)
        except Unreadable as error:
            raise refusal(self.param, str(error)) from None
        except MemoryError:
            raise StageError(
                f"There is no memory now to decode '{self.param}': send it again later, or a smaller one.",
                code="overloaded",
                param=self.param,
            ) from None
        except Exception as error:  # decoders meet broken bytes with OSError, SyntaxError, ValueError, struct.error ...
            what = f"is no {kinds.said(self.header.format)} that can be decoded: it is cut off or broken"
            raise refusal(self.param, what) from error

    def _decoded(self, least: int | None) -> Image.Image:
        header = self.header
        with Image.open(io.BytesIO(header.data), formats=[header.format]) as image:
            if image.size != header.size:
                raise Unreadable("says two different sizes")
            reduction = self._reduction(least)
            if reduction > 1:
                image.draft(None, (header.size[0] // reduction, header.size[1] // reduction))
            image.load()
            return as_seen(image, header)

    def _reduction(self, least: int | None) -> int:
        if least is None or self.header.format != "JPEG":
            return 1
        return next((by for by in _REDUCTIONS if min(self.header.size) // by >= max(least, 1)), 1)
