"""From a url to encoded bytes: data URIs, and what is refused before anything is fetched."""

import base64

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.errors import StageError
from pipelines.images.encoded import check_size, encoded, is_remote
from pipelines.images.fetch import Fetching
from tests.picture_bytes import known, saved

PARAM = "messages[0].content[1].image_url.url"
PNG = saved(known(), "PNG")
JPEG = saved(known(), "JPEG")
OFF = Fetching(on=False)


def held(url: str, fetching: Fetching = OFF) -> bytes:
    return encoded(url, param=PARAM, fetching=fetching)


def refused(url: str, fetching: Fetching = OFF) -> str:
    with pytest.raises(StageError) as error:
        held(url, fetching)
    assert (error.value.code, error.value.param) == ("invalid_image", PARAM)
    assert error.value.message.startswith(f"'{PARAM}' ")
    assert len(error.value.message) < 400
    return error.value.message


def uri(data: bytes, start: str = "data:image/png;base64") -> str:
    return start + "," + base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("start", "data"),
    [
        ("data:image/png;base64", PNG),
        ("DATA:IMAGE/PNG;BASE64", PNG),
        ("data:image/png;charset=utf-8;base64", PNG),
        ("data:image/jpeg;base64", JPEG),
        ("data:image/jpg;base64", JPEG),
        ("data:image/webp;base64", saved(known(), "WEBP")),
        ("data:image/gif;base64", saved(known(), "GIF")),
        ("data:image/tiff;base64", saved(known(), "TIFF")),
        ("data:image/bmp;base64", saved(known(), "BMP")),
        ("data:image/x-ms-bmp;base64", saved(known(), "BMP")),
        ("data:application/octet-stream;base64", PNG),
        ("data:;base64", JPEG),
    ],
)
def test_a_data_uri_holds_its_picture(start, data):
    assert held(uri(data, start)) == data


@given(st.text(st.sampled_from("ABab01+/=-_ \n\té"), max_size=24))
@example("AAAB")
@example("AA==")
@example("AB==")  # bits that no byte has: ignored, as the standard library does
@example("A===")
def test_what_is_base64_is_what_the_standard_library_takes(digits):
    """Behind a whole picture, since that is looked at too."""
    text = base64.b64encode(PNG + bytes(-len(PNG) % 3)).decode() + digits
    try:
        wanted = base64.b64decode(text, validate=True) if len(text) % 4 == 0 and not text.endswith("===") else None
    except ValueError:
        wanted = None
    if wanted is None:
        assert "not valid base64" in refused("data:image/png;base64," + text)
    else:
        assert held("data:image/png;base64," + text) == wanted


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (uri(JPEG), "says 'image/png' but its bytes are JPEG: the two must agree"),
        (uri(PNG, "data:image/webp;base64"), "says 'image/webp' but its bytes are PNG"),
        (uri(b"<svg/>"), "says 'image/png' but its bytes are an SVG drawing"),
        (uri(b"<!DOCTYPE html>"), "an HTML or XML page"),
        (uri(b""), "holds no bytes"),
        (uri(PNG, "data:image/svg+xml;base64"), "is SVG, which is not a picture format here: send PNG"),
        (uri(PNG, "data:text/html;base64"), "has the media type 'text/html'"),
        (uri(PNG, "data:application/pdf;base64"), "'application/pdf'"),
        (uri(PNG, "data:image/avif;base64"), "'image/avif'"),
        ("data:image/svg+xml,%3Csvg/%3E", "not base64"),
        ("data:image/png,%89PNG", "not base64"),
        ("data:image/png;base64", "without a comma"),
        ("data:image/png;base64" + ";" * 100_000 + ",", "without a comma"),
        ("data:image/png;base64;charset=x," + base64.b64encode(PNG).decode(), "not base64"),
        ("data:", "without a comma"),
        (uri(PNG)[:-1], "not valid base64"),
        (uri(PNG) + "=", "not valid base64"),
        (uri(PNG) + "====", "not valid base64"),
        (uri(PNG + b"x") + "AAAA", "not valid base64"),
        (uri(PNG).replace("A", "\n", 1), "not valid base64"),
        (uri(PNG) + "\n", "not valid base64"),
        (uri(PNG).replace(",", ", ", 1), "not valid base64"),
        ("data:image/png;base64,-_-_", "not valid base64"),
        ("data:image/png;base64,éééé", "not valid base64"),
        ("ftp://example.com/a.png", "has the scheme 'ftp'"),
        ("file:///etc/passwd", "has the scheme 'file'"),
        ("javascript:alert(1)", "has the scheme 'javascript'"),
        ("gopher://x", "has the scheme 'gopher'"),
        ("blob:https://example.com/1", "has the scheme 'blob'"),
        ("example.com/a.png", "is no URL"),
        ("//example.com/a.png", "is no URL"),
        (" https://example.com/a.png", "is no URL"),
        ("", "is no URL"),
        ("x" * 1_000_000, "is no URL"),
        (base64.b64encode(PNG).decode(), "is no URL"),
        ("https://example.com/a.png", "this server fetches none"),
    ],
)
def test_what_is_wrong_is_said(url, problem):
    assert problem in refused(url)


def test_the_cap_is_exact():
    for extra in range(4):
        data = PNG + bytes(extra)
        url = uri(data)
        assert held(url, Fetching(on=False, max_bytes=len(data))) == data
        message = refused(url, Fetching(on=False, max_bytes=len(data) - 1))
        assert f"larger than the {len(data) - 1} bytes" in message


def test_what_is_far_too_large_is_not_even_read():
    assert "larger than" in refused("data:image/png;base64," + "!" * 40_000_000)


def test_the_cap_for_bytes_without_a_url():
    check_size(5, param="image", max_bytes=5)
    with pytest.raises(StageError, match="'image' is larger than the 5 bytes"):
        check_size(6, param="image", max_bytes=5)


def test_what_is_somewhere_else():
    assert is_remote("HTTP://a/b")
    assert is_remote("https://a/b")
    assert not is_remote(uri(PNG))
    assert not is_remote("httpx://a")
