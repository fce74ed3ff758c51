"""Pictures as bytes for tests: one that shows every mistake, in any format, and headers that promise what is not there.

The known picture is 64 x 48: a black square at the top left, then red at the left and blue at the right.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

SIZE = (64, 48)
BLACK, RED, BLUE, WHITE = (0, 0, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255)


def known(mode: str = "RGB", left: Any = RED, right: Any = BLUE, corner: Any = BLACK) -> Image.Image:
    image = Image.new(mode, SIZE, right)
    image.paste(left, (0, 0, 32, 48))
    image.paste(corner, (0, 0, 16, 16))
    return image


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def assert_known(
    image: Image.Image, tolerance: int = 0, left: Any = RED, right: Any = BLUE, corner: Any = BLACK
) -> None:
    """At points away from every edge, so that a lossy format must be nearly right there."""
    assert (image.mode, image.size) == ("RGB", SIZE)
    for point, wanted in (
        ((6, 6), corner),
        ((10, 10), corner),
        ((6, 40), left),
        ((24, 8), left),
        ((40, 8), right),
        ((58, 40), right),
    ):
        got = image.getpixel(point)
        assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) <= tolerance, (point, got, wanted)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    depth: int, colour: int, rows: bytes, *chunks: bytes, size: tuple[int, int] = SIZE, after: tuple[bytes, ...] = ()
) -> bytes:
    """`rows` without filter bytes; `chunks` stand before the pixels, `after` behind them."""
    length = len(rows) // size[1] if size[1] else 0
    filtered = b"".join(b"\0" + rows[at : at + length] for at in range(0, len(rows), length)) if length else b""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            *chunks,
            png_chunk(b"IDAT", zlib.compress(filtered)),
            *after,
            png_chunk(b"IEND", b""),
        )
    )


def samples(left: list[int], right: list[int], corner: list[int], dtype: str) -> bytes:
    """The rows of the known picture."""
    rows = np.empty((48, 64, len(left)), dtype)
    rows[:, :32], rows[:, 32:], rows[:16, :16] = left, right, corner
    return rows.tobytes()


def packed(left: int, right: int, corner: int, depth: int) -> bytes:
    """The rows with samples of fewer than 8 bits."""
    rows = np.frombuffer(samples([left], [right], [corner], "u1"), "u1").reshape(48, 64)
    bits = np.unpackbits(rows[..., None], axis=-1)[..., 8 - depth :]
    return np.packbits(bits.reshape(48, -1), axis=-1).tobytes()


def exif(orientation: int, order: str = "<", more: bytes = b"", entries: int = 1) -> bytes:
    mark = b"II" if order == "<" else b"MM"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + mark + struct.pack(order + "HIH", 42, 8, entries) + entry + more + bytes(4)


def tiff(tags: dict[int, tuple[int, list[int]]], pixels: bytes, order: str = "<", next_directory: int = 0) -> bytes:
    """A classic TIFF of one strip: `tags` are (type, values) with types 3 (16 bits) and 4 (32 bits)."""
    tags = {**tags, 273: (4, [8]), 279: (4, [len(pixels)])}
    start = 8 + len(pixels)
    entries, later = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        body = struct.pack(order + str(len(values)) + {3: "H", 4: "I"}[kind], *values)
        if len(body) > 4:
            at = start + 2 + 12 * len(tags) + 4 + len(later)
            later += body
            body = struct.pack(order + "I", at)
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + body.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start)
    return (
        head + pixels + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", next_directory) + later
    )


def profile(red: tuple[float, ...], green: tuple[float, ...], blue: tuple[float, ...], gamma: float = 2.2) -> bytes:
    """An ICC profile of three primaries (XYZ under D50) and a gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    tags = {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"wtpt": _xyz(0.9642, 1.0, 0.8249)}
    tags |= {b"rXYZ": _xyz(*red), b"gXYZ": _xyz(*green), b"bXYZ": _xyz(*blue)}
    return _icc(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    return _icc(b"GRAY", {b"kTRC": curve, b"wtpt": _xyz(0.9642, 1.0, 0.8249)})


SRGB_PRIMARIES = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))


def _xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def ink_profile() -> bytes:
    """Of a press whose first ink is black, and whose other inks are not seen."""
    same = bytes(range(256))
    table = bytes((255, 128, 128)) * 8 + bytes((0, 128, 128)) * 8  # Lab: white without the first ink, black with it
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    body = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + same * 4 + table + same * 3
    return _icc(b"CMYK", {b"A2B0": body, b"wtpt": _xyz(0.9642, 1.0, 0.8249)}, b"prtr", b"Lab ")


def _icc(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", connection: bytes = b"XYZ ") -> bytes:
    name = b"a test\0"
    description = b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78)
    tags = {**tags, b"desc": description, b"cprt": b"text" + bytes(4) + b"none\0"}
    table, bodies = b"", b""
    at = 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        body += bytes(-len(body) % 4)
        table += name + struct.pack(">II", at + len(bodies), len(body))
        bodies += body
    start = at + len(bodies), b"lcms", 0x02100000, kind, space, connection, bytes(12), b"acsp"
    header = struct.pack(">I4sI4s4s4s12s4s", *start)
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + bodies
