"""The header of a BMP: its size."""

from __future__ import annotations

import struct

from pipelines.images.header import Header, cut_off

_OLD = 12  # bytes of the header whose numbers have 16 bits


def header(data: bytes) -> Header:
    try:
        (length,) = struct.unpack_from("<I", data, 14)
        width, height = struct.unpack_from("<HH" if length == _OLD else "<ii", data, 18)
    except struct.error:
        raise cut_off() from None
    return Header("BMP", (max(width, 0), abs(height)), data)  # a negative height: rows from the top
