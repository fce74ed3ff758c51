"""Pictures of every format, by the truth of their pixels."""

import io
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import StageError
from pipelines.images.decode import open_picture
from tests.picture_bytes import (
    BLUE,
    RED,
    SIZE,
    SRGB_PRIMARIES,
    WHITE,
    assert_known,
    exif,
    grey_profile,
    ink_profile,
    known,
    packed,
    png,
    png_chunk,
    profile,
    samples,
    saved,
    tiff,
)

GREYS = {"left": 80, "right": 200, "corner": 0}
GREY_SEEN = {"left": (80,) * 3, "right": (200,) * 3}
PARAM = "messages[0].content[1].image_url.url"


def decoded(data: bytes, least: int | None = None, max_pixels: int = 50_000_000) -> Image.Image:
    picture = open_picture(data, param=PARAM, max_pixels=max_pixels)
    image = picture.decode(least)
    if least is None:
        assert picture.size == image.size
    return image


def palette_picture() -> Image.Image:
    return known().quantize(4)


WIDE = samples([65535, 0, 0], [0, 0, 65535], [0, 0, 0], ">u2")
WIDE_GREY = samples([80 * 257], [200 * 257], [0], ">u2")
TIFF_RGB_16 = {256: (4, [64]), 257: (4, [48]), 258: (3, [16] * 3), 259: (3, [1]), 262: (3, [2]), 277: (3, [3])}


def tiff_grey_16(photometric: int, order: str) -> bytes:
    tags = {256: (3, [64]), 257: (3, [48]), 258: (3, [16]), 259: (3, [1]), 262: (3, [photometric]), 277: (3, [1])}
    pixels = samples([80 * 257], [200 * 257], [0], order + "u2")
    return tiff(tags, bytes(255 - b for b in pixels) if photometric == 0 else pixels, order)


EXACT = {
    "PNG": lambda: saved(known(), "PNG"),
    "PNG with alpha": lambda: saved(known("RGBA"), "PNG"),
    "PNG palette": lambda: saved(palette_picture(), "PNG"),
    "PNG palette of 2 bits": lambda: png(2, 3, packed(1, 2, 0, 2), png_chunk(b"PLTE", bytes((0, 0, 0, *RED, *BLUE)))),
    "PNG 16-bit RGB": lambda: png(16, 2, WIDE),
    "PNG 16-bit RGBA": lambda: png(16, 6, samples([65535, 0, 0, 65535], [0, 0, 65535, 65535], [0, 0, 0, 65535], ">u2")),
    "PNG animated": lambda: saved(known(), "PNG", save_all=True, append_images=[Image.new("RGB", SIZE)]),
    "WebP lossless": lambda: saved(known(), "WEBP", lossless=True),
    "WebP with alpha": lambda: saved(known("RGBA"), "WEBP", lossless=True),
    "WebP animated": lambda: saved(
        known(), "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", SIZE)]
    ),
    "GIF": lambda: saved(palette_picture(), "GIF"),
    "GIF animated": lambda: saved(palette_picture(), "GIF", save_all=True, append_images=[Image.new("RGB", SIZE)]),
    "BMP": lambda: saved(known(), "BMP"),
    "BMP 32 bits": lambda: saved(known("RGBA"), "BMP"),
    "BMP palette": lambda: saved(palette_picture(), "BMP"),
    "TIFF": lambda: saved(known(), "TIFF"),
    "TIFF LZW": lambda: saved(known(), "TIFF", compression="tiff_lzw"),
    "TIFF deflate, predicted": lambda: saved(known(), "TIFF", compression="tiff_adobe_deflate", tiffinfo={317: 2}),
    "TIFF PackBits": lambda: saved(known(), "TIFF", compression="packbits"),
    "TIFF palette": lambda: saved(palette_picture(), "TIFF"),
    "TIFF with alpha": lambda: saved(known("RGBA"), "TIFF"),
    "TIFF CMYK": lambda: saved(known().convert("CMYK"), "TIFF"),
    "TIFF of 64 bits": lambda: saved(known(), "TIFF", big_tiff=True),
    "TIFF of 64 bits, LZW": lambda: saved(known(), "TIFF", big_tiff=True, compression="tiff_lzw"),
    "TIFF of pages": lambda: saved(known(), "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    "TIFF 16-bit RGB": lambda: tiff(TIFF_RGB_16, samples([65535, 0, 0], [0, 0, 65535], [0, 0, 0], "<u2")),
    "TIFF 16-bit RGB, big-endian": lambda: tiff(TIFF_RGB_16, WIDE, ">"),
}

LOSSY = {
    "JPEG": lambda: saved(known(), "JPEG", quality=95),
    "JPEG without subsampling": lambda: saved(known(), "JPEG", quality=95, subsampling=0),
    "JPEG progressive": lambda: saved(known(), "JPEG", quality=95, progressive=True),
    "JPEG CMYK": lambda: saved(known().convert("CMYK"), "JPEG", quality=95),
    "JPEG RGB": lambda: saved(known(), "JPEG", quality=95, keep_rgb=True),
    "MPO": lambda: saved(known(), "MPO", quality=95, save_all=True, append_images=[Image.new("RGB", SIZE)]),
    "WebP": lambda: saved(known(), "WEBP", quality=95),
    "TIFF JPEG": lambda: saved(known(), "TIFF", compression="jpeg", quality=95),
    "TIFF YCbCr": lambda: saved(known().convert("YCbCr"), "TIFF"),
}

GREY = {
    "PNG grey": lambda: saved(known("L", **GREYS), "PNG"),
    "PNG grey with alpha": lambda: png(8, 4, samples([80, 255], [200, 255], [0, 255], "u1")),
    "PNG 16-bit grey": lambda: png(16, 0, WIDE_GREY),
    "PNG 16-bit grey with alpha": lambda: png(16, 4, samples([80 * 257, 65535], [200 * 257, 65535], [0, 65535], ">u2")),
    "JPEG grey": lambda: saved(known("L", **GREYS), "JPEG", quality=95),
    "GIF grey": lambda: saved(known("L", **GREYS), "GIF"),
    "TIFF grey": lambda: saved(known("L", **GREYS), "TIFF"),
    "TIFF 16-bit grey": lambda: tiff_grey_16(1, "<"),
    "TIFF 16-bit grey, big-endian": lambda: tiff_grey_16(1, ">"),
    "TIFF 16-bit grey, white is zero": lambda: tiff_grey_16(0, "<"),
    "BMP grey": lambda: saved(known("L", **GREYS), "BMP"),
}

BITS = {256: (3, [64]), 257: (3, [48]), 258: (3, [1]), 259: (3, [1]), 262: (3, [0]), 277: (3, [1])}
BLACK_AND_WHITE = {
    "PNG": lambda: saved(known("1", 1, 0, 0), "PNG"),
    "GIF": lambda: saved(known("1", 1, 0, 0), "GIF"),
    "BMP": lambda: saved(known("1", 1, 0, 0), "BMP"),
    "TIFF": lambda: saved(known("1", 1, 0, 0), "TIFF"),
    "TIFF fax": lambda: saved(known("1", 1, 0, 0), "TIFF", compression="group4"),
    "TIFF, zero is white": lambda: tiff(BITS, packed(0, 1, 1, 1)),
}

# What is red at the left is there; what is at the right is transparent, and black or blue if its alpha is not seen.
TRANSPARENT = {
    "PNG": lambda: saved(known("RGBA", right=(0, 0, 255, 0)), "PNG"),
    "PNG 16-bit": lambda: png(16, 6, samples([65535, 0, 0, 65535], [0, 0, 65535, 0], [0, 0, 0, 65535], ">u2")),
    "PNG palette": lambda: png(
        8,
        3,
        samples([1], [2], [0], "u1"),
        png_chunk(b"PLTE", bytes((0, 0, 0, *RED, *BLUE))),
        png_chunk(b"tRNS", b"\xff\xff\0"),
    ),
    "PNG colour": lambda: png(
        8, 2, samples([255, 0, 0], [0, 0, 255], [0, 0, 0], "u1"), png_chunk(b"tRNS", struct.pack(">3H", 0, 0, 255))
    ),
    "PNG 16-bit colour": lambda: png(16, 2, WIDE, png_chunk(b"tRNS", struct.pack(">3H", 0, 0, 65535))),
    "WebP": lambda: saved(known("RGBA", right=(0, 0, 255, 0)), "WEBP", lossless=True, exact=True),
    "GIF": lambda: saved(known("RGBA", right=(0, 0, 255, 0)), "GIF"),
    "TIFF": lambda: saved(known("RGBA", right=(0, 0, 255, 0)), "TIFF"),
}

# A grey of so many bits that stands for nothing: left 1, right the transparent one, corner 0.
FEW_BITS = [(1, 1, 0), (2, 1, 2), (4, 5, 10), (8, 85, 170), (16, 85 * 257, 170 * 257)]


@pytest.mark.parametrize("name", EXACT)
def test_a_picture_without_loss_is_exactly_as_it_was(name):
    assert_known(decoded(EXACT[name]()))


@pytest.mark.parametrize("name", LOSSY)
def test_a_picture_with_loss_is_nearly_as_it_was(name):
    assert_known(decoded(LOSSY[name]()), tolerance=12)


@pytest.mark.parametrize("name", GREY)
def test_greys_are_as_bright_as_they_were(name):
    assert_known(decoded(GREY[name]()), tolerance=2, **GREY_SEEN)


@pytest.mark.parametrize("name", BLACK_AND_WHITE)
def test_black_and_white(name):
    assert_known(decoded(BLACK_AND_WHITE[name]()), left=WHITE, right=(0, 0, 0))


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_is_white(name):
    assert_known(decoded(TRANSPARENT[name]()), right=WHITE)


@pytest.mark.parametrize(("depth", "left", "right"), FEW_BITS)
def test_a_grey_that_stands_for_nothing_is_white(depth, left, right):
    rows = samples([left], [right], [left], ">u2") if depth == 16 else packed(left, right, left, depth)
    seen = (left * 255 // (2**depth - 1),) * 3
    plain = decoded(png(depth, 0, rows))
    assert_known(plain, left=seen, right=(right * 255 // (2**depth - 1),) * 3, corner=seen)
    assert_known(
        decoded(png(depth, 0, rows, png_chunk(b"tRNS", struct.pack(">H", right)))), left=seen, right=WHITE, corner=seen
    )


def test_half_transparent_lies_on_white():
    assert_known(decoded(saved(known("RGBA", left=(255, 0, 0, 128)), "PNG")), tolerance=1, left=(255, 127, 127))


def test_lab_is_seen_as_its_colours():
    # sRGB's red is L* 54, a* 81, b* 70 under D50; the file has L* of 255 and signed a* and b*. Half of it is grey.
    tags = {256: (3, [64]), 257: (3, [48]), 258: (3, [8] * 3), 259: (3, [1]), 262: (3, [8]), 277: (3, [3])}
    red, grey = [138, 81, 70], [128, 0, 0]
    assert_known(decoded(tiff(tags, samples(red, grey, [0, 0, 0], "u1"))), tolerance=6, right=(120,) * 3)


def test_a_frame_that_does_not_fill_the_screen_lies_on_white():
    small = saved(Image.new("P", (8, 8), 0), "GIF")
    at = small.index(b",\0\0\0\0\x08\0\x08\0")
    data = (
        small[:6]
        + struct.pack("<HH", 40, 30)
        + small[10:at]
        + struct.pack("<cHHHH", b",", 30, 20, 8, 8)
        + small[at + 9 :]
    )
    image = decoded(data)
    assert image.size == (40, 30)
    assert image.getpixel((31, 21)) == (0, 0, 0)
    assert {image.getpixel(point) for point in ((0, 0), (29, 19), (39, 29))} == {WHITE}


def test_rows_of_a_bmp_may_run_from_the_top():
    data = bytearray(saved(known(), "BMP"))
    data[22:26] = struct.pack("<i", -48)
    assert_known(decoded(bytes(data)).transpose(Image.Transpose.FLIP_TOP_BOTTOM))


# What a camera held in some way writes: the known picture turned back, and how to turn it.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored(orientation: int) -> Image.Image:
    turn = STORED[orientation]
    return known() if turn is None else known().transpose(turn)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("order", "<>")
def test_a_photo_is_turned_as_its_exif_says(orientation, order):
    image, said = stored(orientation), exif(orientation, order)
    assert_known(decoded(saved(image, "JPEG", quality=95, exif=said)), tolerance=12)
    assert_known(decoded(saved(image, "PNG", exif=said[6:])))
    assert_known(decoded(saved(image, "WEBP", lossless=True, exif=said)))
    for compression in ("raw", "tiff_lzw"):
        assert_known(decoded(saved(image, "TIFF", tiffinfo={274: orientation}, compression=compression)))


def test_an_orientation_after_the_pixels_of_a_png_counts():
    image = stored(6)
    rows = np.asarray(image).tobytes()
    assert_known(decoded(png(8, 2, rows, size=image.size, after=(png_chunk(b"eXIf", exif(6)[6:]),))))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(orientation):
    assert_known(decoded(saved(known(), "PNG", exif=exif(orientation)[6:])))


@pytest.mark.parametrize("broken", [b"", b"Exif\0\0", exif(6)[6:20], b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20)])
def test_exif_that_is_broken_turns_nothing(broken):
    assert_known(decoded(png(8, 2, np.asarray(known()).tobytes(), png_chunk(b"eXIf", broken))))


def swapped_profile() -> bytes:
    red, green, blue = SRGB_PRIMARIES
    return profile(blue, green, red)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_in_another_space_are_brought_into_srgb(format):
    """In a space whose red is blue, red is blue."""
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(format, {})
    image = decoded(saved(known(), format, icc_profile=swapped_profile(), **lossless))
    assert_known(image, tolerance=14, left=BLUE, right=RED)


def test_a_palette_and_what_is_transparent_are_in_that_space_too():
    image = decoded(saved(known("RGBA", right=(0, 0, 255, 0)), "PNG", icc_profile=swapped_profile()))
    assert_known(image, tolerance=6, left=BLUE, right=WHITE)
    image = decoded(saved(palette_picture(), "PNG", icc_profile=swapped_profile()))
    assert_known(image, tolerance=6, left=BLUE, right=RED)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_a_profile_of_inks(format):
    """Without it the first ink is cyan, and the last black."""
    image = known("CMYK", left=(255, 0, 0, 0), right=(0, 0, 0, 0), corner=(0, 0, 0, 255))
    lossless = {"quality": 95} if format == "JPEG" else {}
    seen = decoded(saved(image, format, icc_profile=ink_profile(), **lossless))
    assert_known(seen, tolerance=8, left=(0, 0, 0), right=WHITE, corner=WHITE)


def test_a_profile_of_greys():
    # With gamma 1 a half is as bright as sRGB's 188.
    image = decoded(saved(known("L", left=128, right=255, corner=0), "PNG", icc_profile=grey_profile(1.0)))
    assert_known(image, tolerance=2, left=(188,) * 3, right=WHITE)


@pytest.mark.parametrize(
    "broken",
    [b"not a profile", swapped_profile()[:200], grey_profile(1.0), bytes(200), swapped_profile()[:128] + b"\xff" * 300],
)
def test_a_profile_that_is_broken_or_for_other_colours_says_nothing(broken):
    assert_known(decoded(saved(known(), "PNG", icc_profile=broken)))
    assert_known(decoded(saved(known(), "WEBP", lossless=True, icc_profile=broken)))


def photo(size: tuple[int, int], **options: object) -> bytes:
    return saved(known().resize(size, Image.Resampling.NEAREST), "JPEG", quality=95, **options)


@pytest.mark.parametrize(
    ("size", "least", "wanted"),
    [
        ((640, 480), None, (640, 480)),
        ((640, 480), 481, (640, 480)),
        ((640, 480), 480, (640, 480)),
        ((640, 480), 241, (640, 480)),
        ((640, 480), 240, (320, 240)),
        ((640, 480), 121, (320, 240)),
        ((640, 480), 120, (160, 120)),
        ((640, 480), 60, (80, 60)),
        ((640, 480), 1, (80, 60)),
        ((641, 487), 240, (321, 244)),
        ((641, 487), 60, (81, 61)),
        ((20, 3), 1, (10, 2)),
        ((1, 1), 1, (1, 1)),
    ],
)
def test_a_jpeg_may_be_decoded_smaller(size, least, wanted):
    image = decoded(photo(size), least)
    assert image.size == wanted
    if least is not None and min(size) >= least:
        assert min(image.size) >= least


def test_a_smaller_one_shows_the_same_and_is_turned_after():
    image = decoded(photo((512, 384)), 48)
    assert_known(image, tolerance=12)
    turned = Image.open(io.BytesIO(photo((512, 384)))).transpose(Image.Transpose.ROTATE_90)
    picture = open_picture(saved(turned, "JPEG", quality=95, exif=exif(6)), param=PARAM, max_pixels=512 * 384)
    assert picture.size == (512, 384)
    assert_known(picture.decode(48), tolerance=14)
    assert picture.bytes_for(48) * 60 < picture.bytes_needed


def test_other_formats_are_decoded_whole():
    assert decoded(saved(known(), "PNG"), 4).size == SIZE


def test_a_picture_can_be_decoded_again_and_by_many_at_once():
    makers = {**EXACT, **LOSSY}
    pictures = {name: open_picture(make(), param=name, max_pixels=10**6) for name, make in makers.items()}
    wrong: list[object] = []

    def work() -> None:
        for name, picture in pictures.items():
            try:
                assert_known(picture.decode(), tolerance=12)
            except BaseException as error:
                wrong.append((name, error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


MEASURED = """
import sys, re
from pipelines.images.decode import open_picture
data = open(sys.argv[1], "rb").read()
open_picture(open(sys.argv[2], "rb").read(), param="", max_pixels=10**9).decode()  # whatever is loaded once
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
picture = open_picture(data, param="", max_pixels=10**9)
opened = peak() - before
image = picture.decode()
print(opened, peak() - before, picture.bytes_needed, len(data))
"""

LARGE = {
    "PNG": lambda image: saved(image, "PNG", compress_level=1),
    "PNG alpha, profile": lambda image: saved(
        image.convert("RGBA").rotate(1), "PNG", compress_level=1, icc_profile=swapped_profile(), exif=exif(6)[6:]
    ),
    "PNG transparent colour": lambda image: png(
        8, 2, np.asarray(image).tobytes(), png_chunk(b"tRNS", bytes(6)), size=image.size
    ),
    "PNG 16-bit grey": lambda image: png(
        16, 0, np.zeros(image.size[::-1], ">u2").tobytes(), png_chunk(b"tRNS", bytes(2)), size=image.size
    ),
    "JPEG": lambda image: saved(image, "JPEG"),
    "JPEG turned, profile": lambda image: saved(image, "JPEG", icc_profile=swapped_profile(), exif=exif(6)),
    "JPEG progressive": lambda image: saved(image, "JPEG", progressive=True),
    "JPEG CMYK, progressive": lambda image: saved(image.convert("CMYK"), "JPEG", progressive=True, exif=exif(6)),
    "WebP": lambda image: saved(image, "WEBP", method=0),
    "WebP alpha": lambda image: saved(image.convert("RGBA").rotate(1), "WEBP", lossless=True, method=0, exif=exif(6)),
    "GIF": lambda image: saved(image.quantize(4), "GIF"),
    "GIF transparent": lambda image: saved(image.convert("RGBA").rotate(1), "GIF"),
    "BMP": lambda image: saved(image, "BMP"),
    "TIFF": lambda image: saved(image, "TIFF", tiffinfo={274: 6}, icc_profile=swapped_profile()),
    "TIFF LZW alpha": lambda image: saved(
        image.convert("RGBA").rotate(1), "TIFF", compression="tiff_lzw", tiffinfo={274: 6, 278: 3000}
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_no_more_memory_is_taken_than_was_asked_for(name, tmp_path):
    for file, size in (("large", (3200, 2400)), ("small", SIZE)):
        (tmp_path / file).write_bytes(LARGE[name](known().resize(size, Image.Resampling.NEAREST)))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    opened, peak, needed, encoded = map(int, done.stdout.split())
    slack = 8 * 1024 * 1024  # of the interpreter
    assert opened <= 2 * encoded + slack
    # The bytes that the decoder gets are counted by whoever holds the encoded ones.
    assert peak <= needed + 3 * encoded + slack


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (lambda: saved(Image.new("F", SIZE), "TIFF"), "32 bits"),
        (lambda: saved(Image.new("I", SIZE), "TIFF"), "32 bits"),
    ],
)
def test_samples_that_no_screen_shows_are_refused(data, problem):
    with pytest.raises(StageError, match=problem) as refused:
        decoded(data())
    assert refused.value.param == PARAM
