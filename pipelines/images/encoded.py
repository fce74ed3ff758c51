"""From the url of an image part to encoded bytes: a data URI holds them, http and https are fetched.

Decodes no picture. What a data URI says of its bytes must be true.
"""

from __future__ import annotations

import pybase64

from pipelines.images import kinds
from pipelines.images.fetch import Fetching, fetch
from pipelines.images.readers import refusal

_MAX_HEADER = 256  # of a data URI, up to its comma
_REMEDY = f"send {kinds.ACCEPTED} as 'data:image/png;base64,...', or an http or https URL"


def is_remote(url: str) -> bool:
    """Whether the bytes are somewhere else, and take a fetch."""
    return _scheme(url) in ("http", "https")


def encoded(url: str, *, param: str, fetching: Fetching) -> bytes:
    """The bytes that the url holds or leads to, at most `fetching.max_bytes`. StageError names `param`."""
    scheme = _scheme(url)
    if scheme == "data":
        return held(url, param=param, max_bytes=fetching.max_bytes)
    if scheme in ("http", "https"):
        return fetch(url, param=param, fetching=fetching)
    if scheme:
        raise refusal(param, f"has the scheme '{scheme}', from which no picture is taken: {_REMEDY}")
    raise refusal(param, f"is no URL: {_REMEDY}")


def held(url: str, *, param: str, max_bytes: int) -> bytes:
    """The bytes of a data URI."""
    comma = url.find(",", 0, _MAX_HEADER)
    if comma < 0:
        raise refusal(param, "is a data URI without a comma after its media type")
    media_type, *attributes = url[len("data:") : comma].split(";")
    if not attributes or attributes[-1].strip().lower() != "base64":
        raise refusal(param, "is a data URI that is not base64: send 'data:image/png;base64,...'")
    promised = kinds.promised(media_type)
    if promised is None:
        raise refusal(param, _no_picture(media_type))
    digits = len(url) - comma - 1
    check_size(digits // 4 * 3 - 2, param=param, max_bytes=max_bytes)  # with two of padding it is so little
    try:
        if digits % 4 or url.endswith("==="):
            raise ValueError("padding, of which decoders take too much")
        data = pybase64.b64decode(url[comma + 1 :], validate=True)
    except ValueError:
        raise refusal(
            param, "is not valid base64: the standard alphabet, padded with '=', and nothing else, not even line breaks"
        ) from None
    check_size(len(data), param=param, max_bytes=max_bytes)
    found = kinds.picture_format(data)
    if promised and found != promised:
        what = kinds.said(found) if found else kinds.described(data)
        raise refusal(param, f"says '{media_type.strip().lower()}' but its bytes are {what}: the two must agree")
    return data


def check_size(size: int, *, param: str, max_bytes: int) -> None:
    """For encoded bytes that come without a URL."""
    if size > max_bytes:
        raise refusal(param, f"is larger than the {max_bytes} bytes that are taken: send a smaller picture")


def _scheme(url: str) -> str:
    """Lower case and short; empty if there is none."""
    scheme = url[:_MAX_HEADER].partition(":")[0]
    good = scheme[:1].isalpha() and scheme.isascii() and all(c.isalnum() or c in "+-." for c in scheme)
    return scheme.lower() if good and len(scheme) <= 32 and ":" in url[: len(scheme) + 1] else ""


def _no_picture(media_type: str) -> str:
    said = media_type.strip().lower()
    if said == "image/svg+xml":
        return f"is SVG, which is not a picture format here: send {kinds.ACCEPTED}"
    return f"has the media type '{said[:40]}', which is no picture format here: send {kinds.ACCEPTED}"
