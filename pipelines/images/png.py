"""The header of a PNG: its size, transparent colour, colour profile and EXIF orientation. Of an APNG, the default
picture's.
"""

from __future__ import annotations

import struct
import zlib

from pipelines.images.header import MAX_PROFILE_BYTES, WHOLE, Header, Unreadable, cut_off, endless
from pipelines.images.tiff import orientation_of

_MAX_CHUNKS = 1 << 16
_KEPT = frozenset((b"IHDR", b"PLTE", b"IDAT", b"IEND"))
_TRANSPARENT, _PROFILE, _EXIF = b"tRNS", b"iCCP", b"eXIf"
_GREY, _RGB, _PALETTE = 0, 2, 3
_CHUNK = struct.Struct(">I4s")


def header(data: bytes) -> Header:
    if len(data) < 33:
        raise cut_off()
    if data[12:16] != b"IHDR":
        raise Unreadable("does not begin with a PNG header")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    found: dict[bytes, bytes] = {}
    view = memoryview(data)
    kept, start, position = [view[:8]], 8, 8  # `start`: of the run of chunks that are kept
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(data):
            raise endless()
        length, kind = _CHUNK.unpack_from(data, position)
        end = position + 12 + length
        if kind not in _KEPT and not (kind == _TRANSPARENT and colour == _PALETTE):
            if kind in (_TRANSPARENT, _PROFILE, _EXIF):
                found.setdefault(kind, data[position + 8 : end - 4])
            kept.append(view[start:position])
            start = end
        position = end
        if kind == b"IEND":
            break
    else:
        raise Unreadable(f"has more than {_MAX_CHUNKS} chunks")
    kept.append(view[start:position])
    return Header(
        "PNG",
        (width, height),
        b"".join(kept),
        orientation_of(found[_EXIF]) if _EXIF in found else WHOLE,
        _profile(found.get(_PROFILE, b"")),
        depth=depth,
        transparent=_transparent(found.get(_TRANSPARENT, b""), colour),
    )


def _transparent(chunk: bytes, colour: int) -> tuple[int, ...]:
    samples = {_GREY: 1, _RGB: 3}.get(colour, 0)
    return struct.unpack(f">{samples}H", chunk) if samples and len(chunk) == 2 * samples else ()


def _profile(chunk: bytes) -> bytes:
    """A name, a zero, the method and the compressed profile; one that is broken or far too large is none."""
    compressed = chunk.partition(b"\0")[2][1:]
    unpacking = zlib.decompressobj()
    try:
        profile = unpacking.decompress(compressed, MAX_PROFILE_BYTES)
    except zlib.error:
        return b""
    return profile if unpacking.eof else b""
