"""Encoded bytes to their header, by the reader of their format: found bearable, or refused. Decodes nothing."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.errors import StageError
from pipelines.images import bmp, gif, jpeg, kinds, png, tiff, webp
from pipelines.images.header import Header, Unreadable

_READERS: dict[str, Callable[[bytes], Header]] = {
    "PNG": png.header,
    "JPEG": jpeg.header,
    "WEBP": webp.header,
    "GIF": gif.header,
    "TIFF": tiff.header,
    "BMP": bmp.header,
}


def read_header(data: bytes, *, param: str) -> Header:
    """StageError names `param`."""
    found = kinds.picture_format(data)
    if not found:
        raise refusal(param, f"is {kinds.described(data)}: send {kinds.ACCEPTED}")
    try:
        return _READERS[found](data)
    except Unreadable as error:
        raise refusal(param, f"is no {kinds.said(found)} that can be read: it {error}") from None


def refusal(param: str, clause: str) -> StageError:
    return StageError(f"'{param}' {clause}.", code=kinds.INVALID, param=param)
