"""What bytes are, by how they begin, and what a media type promises. Decodes nothing."""

from __future__ import annotations

import re

ACCEPTED = "PNG, JPEG, WebP, GIF, TIFF or BMP"
INVALID = "invalid_image"  # the code of every refusal in this package

# Pillow's names of the formats, and the media types that promise them. A type that promises nothing is an empty one.
_TYPES = {
    "image/png": "PNG",
    "image/x-png": "PNG",
    "image/apng": "PNG",
    "image/vnd.mozilla.apng": "PNG",
    "image/jpeg": "JPEG",
    "image/jpg": "JPEG",
    "image/pjpeg": "JPEG",
    "image/mpo": "JPEG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
    "image/tiff": "TIFF",
    "image/tif": "TIFF",
    "image/bmp": "BMP",
    "image/x-bmp": "BMP",
    "image/x-ms-bmp": "BMP",
    "": "",
    "application/octet-stream": "",
    "binary/octet-stream": "",
}
_SAID = {"WEBP": "WebP"}

_OTHERS = (
    (re.compile(rb"%PDF-"), "a PDF document"),
    (re.compile(rb"PK(\x03\x04|\x05\x06)"), "a ZIP archive"),
    (re.compile(rb"\x1f\x8b"), "gzip data"),
    (re.compile(rb"....ftyp(avif|avis)", re.S), "an AVIF picture"),
    (re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.S), "a HEIF picture"),
    (re.compile(rb"....ftyp", re.S), "a video"),
    (re.compile(rb"\x1aE\xdf\xa3"), "a video"),
    (re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000 picture"),
    (re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "), "a JPEG XL picture"),
    (re.compile(rb"8BPS"), "a Photoshop document"),
    (re.compile(rb"\x00\x00[\x01\x02]\x00[^\x00]"), "an icon"),
    (re.compile(rb"P[1-7]\s"), "a Netpbm picture"),
    (re.compile(rb"%!PS"), "PostScript"),
)
_MARKUP = re.compile(rb"(\xef\xbb\xbf)?\s*<")
_SVG = re.compile(rb"<svg[\s/>]", re.I)
_TEXT = re.compile(rb"[\t\n\r -~\x80-\xff]+")
_LOOKED_AT = 1024


def picture_format(data: bytes) -> str:
    """The accepted format that the bytes begin like, by Pillow's name; empty for none."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    return "BMP" if data.startswith(b"BM") else ""


def described(data: bytes) -> str:
    """What bytes that are no accepted picture seem to be, in words for the user."""
    start = data[:_LOOKED_AT]
    if not start:
        return "nothing: it holds no bytes"
    if _MARKUP.match(start):
        return "an SVG drawing" if _SVG.search(start) else "an HTML or XML page"
    for beginning, what in _OTHERS:
        if beginning.match(start):
            return what
    return "text" if _TEXT.fullmatch(start) else "none of these formats"


def said(picture: str) -> str:
    """The name of a format in a sentence."""
    return _SAID.get(picture, picture)


def promised(media_type: str) -> str | None:
    """The format that a media type promises, empty where it leaves that to the bytes; None: no accepted picture."""
    return _TYPES.get(media_type.strip().lower())
