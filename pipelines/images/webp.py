"""The header of a WebP: its canvas, EXIF orientation and colour profile.

Read before the decoder is made, which takes memory for the whole canvas at once.
"""

from __future__ import annotations

import struct

from pipelines.images.header import MAX_PROFILE_BYTES, WHOLE, Header, Unreadable, cut_off
from pipelines.images.tiff import orientation_of

_MAX_CHUNKS = 1 << 14  # frames, mostly


def header(data: bytes) -> Header:
    if len(data) < 30:
        raise cut_off()
    found = _chunks(data) if data[12:16] == b"VP8X" else {}
    profile = found.get(b"ICCP", b"")
    return Header(
        "WEBP",
        _canvas(data),
        data,
        orientation_of(found[b"EXIF"]) if b"EXIF" in found else WHOLE,
        profile if len(profile) <= MAX_PROFILE_BYTES else b"",
    )


def _canvas(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise Unreadable("does not begin with a WebP header")


def _chunks(data: bytes) -> dict[bytes, bytes]:
    """Those that say something of the pixels; the first of each."""
    found: dict[bytes, bytes] = {}
    position = 12
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(data):
            return found
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind in (b"ICCP", b"EXIF"):
            found.setdefault(kind, data[position + 8 : position + 8 + length])
        position += 8 + length + (length & 1)
    raise Unreadable(f"has more than {_MAX_CHUNKS} chunks")
