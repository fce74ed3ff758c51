"""The header of a JPEG: its frame, its EXIF orientation, its colour profile. Of an MPO, the first picture's."""

from __future__ import annotations

import re

from pipelines.images.header import MAX_PROFILE_BYTES, WHOLE, Header, Unreadable, cut_off, endless
from pipelines.images.tiff import orientation_of

_NOT_FILL = re.compile(rb"[^\xff]")
_MAX_MARKERS = 4096  # a camera's file has some twenty, one with a large profile a hundred
# Each scan goes over the whole picture again, however few bytes it has; encoders write about ten.
_MAX_SCANS = 40
_MAX_FILL = 1 << 16  # bytes before a marker; decoders take any number, encoders write none

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_TABLES = frozenset((0xC4, 0xCC, 0xDB, 0xDD))
_ALONE = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))  # no length follows
_SCAN, _END = 0xDA, 0xD9
_END_MARKER = b"\xff\xd9"  # coded pixels hold no such bytes


def header(data: bytes) -> Header:
    kept: list[bytes | memoryview] = [b"\xff\xd8"]
    frame = exif = None
    profile: dict[int, bytes] = {}
    position = 2
    for _ in range(_MAX_MARKERS):
        marker, start, end = _next_segment(data, position)
        position = end
        body = data[start + 2 : end]
        if marker in _FRAMES:
            if frame is not None:
                raise Unreadable("says its size twice")
            frame = (marker, body)
        if marker == 0xE1 and exif is None and body.startswith(b"Exif\0"):
            exif = body[6:]
        elif marker == 0xE2 and body.startswith(b"ICC_PROFILE\0"):
            profile[body[12] if len(body) > 12 else 0] = body[14:]
        elif marker in _FRAMES | _TABLES or _tells_colours(marker, body):
            kept.append(b"\xff" + bytes((marker,)) + data[start:end])
        elif marker == _SCAN:
            break
    else:
        raise Unreadable("has too many segments in its header")
    if frame is None:
        raise Unreadable("has no frame header")
    marker, body = frame
    if len(body) < 6:
        raise cut_off()
    if body[0] != 8:
        raise Unreadable(f"has {body[0]} bits a sample; JPEG is taken with 8")
    if data.find(_END_MARKER, start) < 0:
        raise endless()
    height, width, layers = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"), body[5]
    kept.append(b"\xff\xda")
    kept.append(memoryview(data)[start:])
    first_scan = data[start + 2] if start + 2 < len(data) else 0
    buffered = marker in _PROGRESSIVE or first_scan < layers
    if buffered and data.count(b"\xff\xda", start) >= _MAX_SCANS:
        raise Unreadable(f"has more than {_MAX_SCANS} scans")
    return Header(
        "JPEG",
        (width, height),
        b"".join(kept),
        orientation_of(exif) if exif else WHOLE,
        _joined(profile),
        buffered=width * height * layers * 2 if buffered else 0,
    )


def _next_segment(data: bytes, position: int) -> tuple[int, int, int]:
    """The next marker that has a length, where its length stands, and where its segment ends."""
    for _ in range(_MAX_MARKERS):
        fill = data.find(b"\xff", position)
        found = _NOT_FILL.search(data, fill, fill + _MAX_FILL) if fill >= 0 else None
        if found is None:
            raise cut_off()
        marker, position = found[0][0], found.end()
        if marker == _END:
            raise Unreadable("ends before its first scan")
        if marker not in _ALONE:
            length = int.from_bytes(data[position : position + 2], "big")
            if length < 2 or position + length > len(data):
                raise cut_off()
            return marker, position, position + length
    raise Unreadable("has too many segments in its header")


def _tells_colours(marker: int, body: bytes) -> bool:
    return (marker == 0xE0 and body.startswith(b"JFIF\0")) or (marker == 0xEE and body.startswith(b"Adobe"))


def _joined(pieces: dict[int, bytes]) -> bytes:
    """A profile comes in numbered pieces; with one missing it is none."""
    if sorted(pieces) != list(range(1, len(pieces) + 1)):
        return b""
    whole = b"".join(pieces[number] for number in sorted(pieces))
    return whole if len(whole) <= MAX_PROFILE_BYTES else b""
