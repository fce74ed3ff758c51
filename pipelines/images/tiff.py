"""The header of a TIFF: the first directory of it, and the same structure where EXIF has it.

The decoder gets the file with that directory written anew at its end: only the entries that make pixels, and no next.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from pipelines.images.header import MAX_PROFILE_BYTES, WHOLE, Header, Unreadable, cut_off

_MAX_ENTRIES = 1024
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 258, 262, 274, 322, 323
_PROFILE = 34675
_PIXELS = frozenset(
    (
        *(_WIDTH, _HEIGHT, _BITS, 259, _PHOTOMETRIC, 266, 273, 277, 278, 279, 284),  # baseline: size, strips, samples
        *(292, 293, 317, 320, _TILE_WIDTH, _TILE_HEIGHT, 324, 325, 338, 339, 347),  # fax, predictor, colours, tiles
        *(529, 530, 531, 532),  # YCbCr
    )
)
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_MAX_TILE_SIDE = 1 << 14


class _Entry(NamedTuple):
    kind: int
    raw: bytes  # the entry itself
    value: bytes


class _Form(NamedTuple):
    """TIFF, or BigTIFF: the same with 64-bit numbers."""

    order: str
    length: str  # the number of a directory's entries
    entry: str  # tag, type, number of values
    offset: str  # of anything
    first: int  # where the header has the first directory's offset


def header(data: bytes) -> Header:
    form = _form(data)
    entries = _directory(data, form)
    numbers = {tag: _number(entry, form.order) for tag, entry in entries.items()}
    width, height = numbers.get(_WIDTH), numbers.get(_HEIGHT)
    if width is None or height is None:
        raise Unreadable("does not say its size")
    if max(numbers.get(_TILE_WIDTH) or 0, numbers.get(_TILE_HEIGHT) or 0) > _MAX_TILE_SIDE:
        raise Unreadable("has tiles of absurd size")
    profile = entries[_PROFILE].value if _PROFILE in entries else b""
    return Header(
        "TIFF",
        (width, height),
        _rewritten(data, form, entries),
        _turn(numbers.get(_ORIENTATION)),
        profile if len(profile) <= MAX_PROFILE_BYTES else b"",
        inverted=numbers.get(_PHOTOMETRIC, 0) == 0 and numbers.get(_BITS) == 16,
    )


def orientation_of(exif: bytes) -> int:
    """What EXIF says of how a picture is to be turned; EXIF that is broken says nothing."""
    try:
        exif = exif.removeprefix(b"Exif\0\0")
        form = _form(exif)
        found = _directory(exif, form, frozenset((_ORIENTATION,))).get(_ORIENTATION)
        return _turn(_number(found, form.order)) if found else WHOLE
    except Unreadable:
        return WHOLE


def _turn(value: int | None) -> int:
    return value if value is not None and 1 <= value <= 8 else WHOLE


def _form(data: bytes) -> _Form:
    order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
    if not order or len(data) < 16:
        raise cut_off()
    version = int.from_bytes(data[2:4], "little" if order == "<" else "big")
    if version == 42:
        return _Form(order, order + "H", order + "HHI", order + "I", 4)
    if version == 43:
        return _Form(order, order + "Q", order + "HHQ", order + "Q", 8)
    raise Unreadable("has a TIFF header of no known version")


def _directory(
    data: bytes, form: _Form, wanted: frozenset[int] = _PIXELS | {_ORIENTATION, _PROFILE}
) -> dict[int, _Entry]:
    """The entries that are wanted, with their values, which together are no longer than the file is."""
    entries: dict[int, _Entry] = {}
    inline = struct.calcsize(form.offset)
    head = struct.calcsize(form.entry)
    left = len(data)
    try:
        (start,) = struct.unpack_from(form.offset, data, form.first)
        (count,) = struct.unpack_from(form.length, data, start)
        if count > _MAX_ENTRIES:
            raise Unreadable(f"has more than {_MAX_ENTRIES} entries in its directory")
        start += struct.calcsize(form.length)
        for at in range(start, start + count * (head + inline), head + inline):
            tag, kind, values = struct.unpack_from(form.entry, data, at)
            if tag not in wanted:
                continue
            size = values * _SIZES.get(kind, 1)
            (offset,) = (at + head,) if size <= inline else struct.unpack_from(form.offset, data, at + head)
            left -= size
            if left < 0 or offset + size > len(data):
                raise cut_off()
            entries[tag] = _Entry(kind, data[at : at + head + inline], data[offset : offset + size])
    except (struct.error, OverflowError):
        raise cut_off() from None
    return entries


def _number(entry: _Entry, order: str) -> int | None:
    """The first value, if that is a whole number."""
    letter = _WHOLE_NUMBERS.get(entry.kind)
    if letter is None or len(entry.value) < struct.calcsize(letter):
        return None
    number: int = struct.unpack_from(order + letter, entry.value)[0]
    return number


def _rewritten(data: bytes, form: _Form, entries: Mapping[int, _Entry]) -> bytes:
    padding = -len(data) % 8
    chosen = [entries[tag].raw for tag in sorted(entries) if tag in _PIXELS]
    width = struct.calcsize(form.offset)
    view = memoryview(data)
    return b"".join(
        (
            view[: form.first],
            struct.pack(form.offset, len(data) + padding),
            view[form.first + width :],
            bytes(padding),
            struct.pack(form.length, len(chosen)),
            *chosen,
            bytes(width),
        )
    )
