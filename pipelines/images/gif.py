"""The header of a GIF: the screen, and where its first frame lies on it. The decoder gets no extension but that
frame's own.
"""

from __future__ import annotations

import struct

from pipelines.images.header import Header, Unreadable, cut_off, endless

_MAX_BLOCKS = 1 << 16
_MAX_PIXEL_BLOCKS = 1 << 17  # of 255 bytes each, but for the last: more than are taken by default
_EXTENSION, _FRAME, _END = 0x21, 0x2C, 0x3B
_CONTROL = 0xF9  # the extension with the transparent colour


def header(data: bytes) -> Header:
    try:
        return _header(data)
    except (IndexError, struct.error):
        raise cut_off() from None


def _header(data: bytes) -> Header:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    start = 13 + _palette_bytes(flags)
    control = b""
    position, blocks = start, 0
    while data[position] != _FRAME:
        begins = position
        if data[position] == _END:
            raise Unreadable("holds no frame")
        if data[position] == _EXTENSION:
            position += 2
            while data[position]:
                position += 1 + data[position]
                blocks += 1
                if blocks > _MAX_BLOCKS:
                    raise _too_many()
            if data[begins + 1] == _CONTROL:
                control = data[begins : position + 1]
        position += 1  # the end of an extension, or what no decoder knows
        blocks += 1
        if blocks > _MAX_BLOCKS:
            raise _too_many()
    left, top, across, down = struct.unpack_from("<HHHH", data, position + 1)
    if not across or not down:
        raise Unreadable("has a frame without pixels")
    if not _ends(data, position + 11 + _palette_bytes(data[position + 9])):
        raise endless()
    return Header(
        "GIF",
        (max(width, left + across), max(height, top + down)),
        data[:start] + control + data[position:],
        frame=(left, top, left + across, top + down),
    )


def _ends(data: bytes, position: int) -> bool:
    """Whether the blocks of coded pixels have one that ends them, as far as it is worth to look."""
    try:
        for _ in range(_MAX_PIXEL_BLOCKS):
            if not data[position]:
                break
            position += 1 + data[position]
    except IndexError:
        return False
    return True


def _palette_bytes(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _too_many() -> Unreadable:
    return Unreadable(f"has more than {_MAX_BLOCKS} blocks before its first frame")
