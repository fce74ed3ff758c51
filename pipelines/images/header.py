"""What the reader of each format finds before anything is decoded, and how it says that it finds nothing.

A reader trusts no byte: its time and memory are bounded by limits of its own, and of the file it hands on only what
makes pixels. Text, comments, thumbnails and metadata never reach the decoder, so what is wrong with them, or hides in
them, harms nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_PROFILE_BYTES = 4 * 1024 * 1024  # colour profiles of presses, the largest there are, take half of it
WHOLE = 1  # the EXIF orientation of a picture stored as it is seen


class Unreadable(ValueError):
    """A clause that goes on from the name of the part: "is cut off in its header"."""


@dataclass(frozen=True)
class Header:
    format: str  # Pillow's name, the only decoder to be asked
    size: tuple[int, int]  # as it is stored, before it is turned
    data: bytes  # for the decoder
    orientation: int = WHOLE
    profile: bytes = b""  # ICC; empty: sRGB
    buffered: int = 0  # bytes that the decoder holds beside the pixels, however small they are asked for
    # What formats have of their own.
    depth: int = 8  # PNG: bits of a sample
    transparent: tuple[int, ...] = ()  # PNG: the colour that stands for nothing, in samples of `depth` bits
    frame: tuple[int, int, int, int] | None = None  # GIF: the box that the first frame fills; the rest is empty
    inverted: bool = False  # TIFF: 16-bit grey whose zero is white, which the decoder leaves so


def cut_off() -> Unreadable:
    return Unreadable("is cut off in its header")


def endless() -> Unreadable:
    """Where a reader sees that the end is missing: a decoder would make most of the pixels before it says so."""
    return Unreadable("is cut off before its end")
